"""`nohype network`: tenant networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.names import complete_network
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.client import Client


@click.group()
def network() -> None:
    """Create, list, show and delete networks.

    A network is a VLAN between the guests that join it: `nohype guest create ... --nic network=NAME`. Guests of different
    networks cannot reach each other through the host or its NICs.
    """


@network.command()
@click.argument("name")
@click.option("--vlan", type=click.IntRange(1, 4094), metavar="NUMBER",
              help="Use this VLAN.  [default: a free VLAN of the uplinks' ranges]. Operators only.")  # fmt: skip
@click.option("--tenant", "owner", metavar="NAME",
              help="The tenant whose guests may join.  [default: yours]. Operators only.")  # fmt: skip
@json_option
@client_option
def create(name: str, *, client: Client, as_json: bool, **fields: Any) -> None:
    """Create a network.

    NAME is 1 to 40 characters of a-z, 0-9 and inner hyphens. If the same network exists, nothing changes.
    """
    request = {"name": name, **{key: value for key, value in fields.items() if value is not None}}
    _show(client.create_network(request), as_json=as_json)


@network.command("list")
@json_option
@client_option
def list_networks(*, as_json: bool, client: Client) -> None:
    """List all networks that you may see."""
    networks = client.networks()
    if as_json:
        print_json(networks)
    elif networks:
        rows = [(one["name"], one["vlan"], one["owner"] or "-", ",".join(one["guests"]) or "-") for one in networks]
        print_table([("NAME", "VLAN", "TENANT", "GUESTS"), *rows])
    else:
        say("no networks")


@network.command()
@click.argument("name", shell_complete=complete_network)
@json_option
@client_option
def show(name: str, *, as_json: bool, client: Client) -> None:
    """Show a network and its guests."""
    _show(client.network(name), as_json=as_json)


@network.command()
@click.argument("name", shell_complete=complete_network)
@json_option
@client_option
def delete(name: str, *, as_json: bool, client: Client) -> None:
    """Delete a network that no guest uses."""
    client.delete_network(name)
    if as_json:
        print_json({"name": name, "state": "deleted"})
    else:
        say(f"{name} deleted")


def _show(shown: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(shown)
        return
    rows = [("name", shown["name"]), ("VLAN", shown["vlan"]), ("guests", ", ".join(shown["guests"]) or "none")]
    if shown["owner"]:
        rows.insert(1, ("tenant", shown["owner"]))
    print_table(rows)
