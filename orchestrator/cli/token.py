"""`nohype token`: makes bearer tokens. Works without a manager; nothing is stored here."""

from __future__ import annotations

import hashlib
import secrets

import click

from orchestrator.cli.output import json_option, print_json
from orchestrator.errors import RequestError
from orchestrator.values import parse_guest_name

# So that programs that look for secrets in the wrong places know it.
_PREFIX = "nohype_"


@click.group()
def token() -> None:
    """Make bearer tokens for the manager's TLS port."""


@token.command()
@click.argument("name")
@click.option(
    "--role", type=click.Choice(["operator", "tenant", "viewer"]), required=True,
    help="What its bearer may do: an operator everything, a tenant all with its own guests, a viewer only look.",
)  # fmt: skip
@click.option("--tenant", metavar="NAME", help="The tenant that it acts for; with --role tenant, and only then.")
@json_option
def new(name: str, *, role: str, tenant: str | None, as_json: bool) -> None:
    """Make a token, and show it once.

    Its hash, for the manager's configuration, is shown with it; the token itself is stored nowhere. NAME is for the configuration
    and the event log: 1 to 40 of a-z, 0-9 and inner hyphens.
    """
    parse_guest_name(name)
    if (role == "tenant") != bool(tenant):
        raise RequestError("a token has a tenant if its role is tenant, and only then", "say --role tenant --tenant NAME")
    if tenant:
        parse_guest_name(tenant)
    secret = _PREFIX + secrets.token_urlsafe(32)
    hashed = f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
    if as_json:
        print_json({"name": name, "token": secret, "hash": hashed, "role": role, "tenant": tenant or ""})
        return
    click.echo(
        f"The token, which is nowhere else:\n\n    {secret}\n\nFor /etc/nohype/nohype.toml; restart the manager afterwards:\n"
    )
    lines = [f"[tokens.{name}]", f'hash = "{hashed}"', f'role = "{role}"', *([f'tenant = "{tenant}"'] if tenant else [])]
    click.echo("\n".join(f"    {line}" for line in lines))
