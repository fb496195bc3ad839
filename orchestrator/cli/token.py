"""`nohype token`: creates bearer tokens. Works without a manager; stores nothing."""

from __future__ import annotations

import hashlib
import secrets

import click

from orchestrator.cli.output import json_option, print_json
from orchestrator.errors import RequestError
from orchestrator.values import parse_guest_name

# So that secret scanners recognise it.
_PREFIX = "nohype_"


@click.group()
def token() -> None:
    """Create bearer tokens for the manager's TLS port."""


@token.command()
@click.argument("name")
@click.option(
    "--role", type=click.Choice(["operator", "tenant", "viewer"]), required=True,
    help="operator: everything; tenant: its own guests; viewer: read-only.",
)  # fmt: skip
@click.option("--tenant", metavar="NAME", help="Tenant of the token; required with --role tenant.")
@json_option
def new(name: str, *, role: str, tenant: str | None, as_json: bool) -> None:
    """Create a token and print it once.

    Its hash is for the manager's configuration; the token itself is stored nowhere. NAME appears in the configuration and in the
    event log: 1 to 40 of a-z, 0-9 and inner hyphens.
    """
    parse_guest_name(name)
    if (role == "tenant") != bool(tenant):
        raise RequestError("a tenant is required with role tenant, otherwise not allowed", "use --role tenant --tenant NAME")
    if tenant:
        parse_guest_name(tenant)
    secret = _PREFIX + secrets.token_urlsafe(32)
    hashed = f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
    if as_json:
        print_json({"name": name, "token": secret, "hash": hashed, "role": role, "tenant": tenant or ""})
        return
    click.echo(f"Token (shown only once):\n\n    {secret}\n\nAdd to /etc/nohype/nohype.toml, then restart the manager:\n")
    lines = [f"[tokens.{name}]", f'hash = "{hashed}"', f'role = "{role}"', *([f'tenant = "{tenant}"'] if tenant else [])]
    click.echo("\n".join(f"    {line}" for line in lines))
