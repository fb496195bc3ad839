"""`nohype who`: from a thing to its owner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.host_rates import describe_thread
from orchestrator.cli.output import json_option, print_json, say
from orchestrator.cli.owners import Owner, find_owners, parse_cpu
from orchestrator.client import Client
from orchestrator.client.host_shapes import GuestActivity
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

    Of a guest or its CPU, an operator is also shown the other threads to which the kernel has switched there, and how often. The
    kernel counts this since the first guest of the host was started.
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
    activity = _read_activity(client, thing, found) if survey else None
    if as_json:
        print_json([{**owner, "threads": activity["others"]} if activity else owner for owner in found])
        return
    for owner in found:
        say(str(owner))
    if activity:
        for line in _describe_threads(activity):
            say(line)


def _read_activity(client: Client, thing: str, found: Sequence[Owner]) -> GuestActivity | None:
    """What runs on the CPU or the cores of a guest; None for another thing, or a guest that does not run."""
    (name, *more), cpu = {owner["guest"] for owner in found}, parse_cpu(thing)
    if more or not name or (cpu is None and thing != name):
        return None
    activity = next((one for one in client.host()["activity"] if one["guest"] == name), None)
    if activity and activity["others"] is not None and cpu is not None:
        activity["others"] = [one for one in activity["others"] if one["cpu"] == cpu]
    return activity


def _describe_threads(activity: GuestActivity) -> Iterator[str]:
    others = activity["others"]
    if others is None:
        yield f"  other threads: not measured: {activity['why'] or 'this version of the manager does not count them'}"
    elif not others:
        yield "  other threads: none since they are counted"
    for one in sorted(others or (), key=lambda one: -one["count"]):
        thread = describe_thread(one["name"], one["tid"], one["pid"], one["unit"])
        yield f"  other thread on CPU {one['cpu']}: {thread}, {one['count']} time slices since they are counted"
