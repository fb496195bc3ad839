"""`nohype quarantine`: guests whose resources are withheld."""

from __future__ import annotations

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.names import complete_quarantined
from orchestrator.cli.output import json_option, print_json, say
from orchestrator.client import Client


@click.group()
def quarantine() -> None:
    """List and clear quarantined guests.

    A guest is in quarantine if its cleanup could not be verified, or if it runs unexpectedly. No other guest gets its resources
    until it is cleared.
    """


@quarantine.command("list")
@json_option
@client_option
def list_quarantined(*, as_json: bool, client: Client) -> None:
    """List quarantined guests, each with its reasons."""
    guests = client.quarantined()
    if as_json:
        print_json(guests)
    elif guests:
        for guest in guests:
            say(f"{guest['name']}, since {guest['since']}")
            for reason in guest["reasons"]:
                say(f"  {reason}")
    else:
        say("no quarantined guests")


@quarantine.command()
@click.argument("name", shell_complete=complete_quarantined)
@click.option("--force", is_flag=True, help="Release the resources even if verification still fails.")
@json_option
@client_option
def clear(name: str, *, force: bool, as_json: bool, client: Client) -> None:
    """Release the resources of the quarantined guest NAME.

    The manager repeats the cleanup first. If it cannot verify the cleanup, the guest stays in quarantine. Operators only.
    """
    client.clear_quarantine(name, force=force)
    if as_json:
        print_json({"name": name, "state": "cleared"})
    else:
        say(f"{name} cleared")
