"""`nohype token`: creates bearer tokens. Stores nothing."""

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
    help="operator: may do everything; tenant: creates and changes its own guests; viewer: may only read.",
)  # fmt: skip
@click.option("--tenant", metavar="NAME", help="Tenant of the token; required with --role tenant.")
@json_option
def new(name: str, *, role: str, tenant: str | None, as_json: bool) -> None:
    """Create a token, and print it once.

    Prints the token, which is stored nowhere, and its entry for the manager's configuration. NAME identifies the token in the
    configuration and in the event log: 1 to 40 characters of a-z, 0-9 and inner hyphens.
    """
    _check_name(name, "token")
    if role == "tenant" and not tenant:
        raise RequestError("role tenant requires a tenant", "add --tenant NAME")
    if role != "tenant" and tenant:
        raise RequestError(f"role {role} does not belong to a tenant", "omit --tenant, or use --role tenant")
    if tenant:
        _check_name(tenant, "tenant")
    secret = _PREFIX + secrets.token_urlsafe(32)
    hashed = f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
    if as_json:
        print_json({"name": name, "token": secret, "hash": hashed, "role": role, "tenant": tenant or ""})
        return
    click.echo(f"Token (shown only once):\n\n    {secret}\n\nAdd to /etc/nohype/nohype.toml, then restart the manager:\n")
    lines = [f"[tokens.{name}]", f'hash = "{hashed}"', f'role = "{role}"', *([f'tenant = "{tenant}"'] if tenant else [])]
    click.echo("\n".join(f"    {line}" for line in lines))


def _check_name(text: str, kind: str) -> None:
    try:
        parse_guest_name(text)
    except RequestError as error:
        raise RequestError(f"{text!r} is not a {kind} name", error.hint) from None
