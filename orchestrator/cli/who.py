"""`nohype who`: from a thing to its owner."""

from __future__ import annotations

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import json_option, print_json, say
from orchestrator.cli.owners import find_owners
from orchestrator.client import Client
from orchestrator.errors import Forbidden, NotFound


@click.command()
@click.argument("thing")
@json_option
@client_option
def who(thing: str, *, as_json: bool, client: Client) -> None:
    """Show who owns a thing of the host, and since when.

    THING is the number of a CPU, the address of a PCI function (0000:41:10.2), a MAC or IP address, the name of an interface, tap
    or guest, the serial number of a disk, or a request id. What no guest of the manager has is shown as free; other programs may
    use it. Of a guest, the command also shows who created it. A tenant is told of its own guests only.
    """
    guests = client.guests()
    try:
        survey = client.survey()
    except Forbidden:
        survey = None
    found = find_owners(thing, guests, survey)
    if not found:
        where = "this host has nothing of this name" if survey else "none of your guests has it"
        raise NotFound(f"{thing}: {where}", "give a CPU, PCI, MAC or IP address, interface, disk or guest; see `nohype survey`")
    if as_json:
        print_json(list(found))
        return
    for owner in found:
        say(str(owner))
