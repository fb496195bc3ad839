"""`nohype fleet hosts`, `drain`, `resume`, `requeue` and `orphans`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.fleet_guests import quotas_option
from orchestrator.cli.fleet_modules import load_fleet
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.client import Client

_COLUMNS = ("HOST", "STATE", "GUESTS", "CORES", "MEMORY", "VFS", "NVME", "FEATURES", "SINCE", "BY", "REASON")


@click.command()
@json_option
def hosts(*, as_json: bool) -> None:
    """List the hosts of the fleet, one line per NUMA node.

    Cores, memory, VFs and NVMe controllers are shown as used/total; guests that are being ended have theirs until they are gone.
    The managers of the hosts are not asked. An asterisk after the state: the node does not respond. For a node that is drained or
    down, the reason, and when and by whom it was set. What the last health check of the host has found is added to the reason.
    """
    uses = load_fleet("use").read_uses()
    if as_json:
        print_json([{**asdict(use.node), "used": _describe_use(use)} for use in uses])
    elif uses:
        print_table([_COLUMNS, *map(_build_row, uses)])
    else:
        say("no hosts")


@click.command()
@click.argument("name", metavar="HOST")
@click.option("--reason", required=True, metavar="WORDS", help="Why, for those who read `nohype fleet hosts`.")
@json_option
def drain(name: str, reason: str, *, as_json: bool) -> None:
    """Start no more guests on a host.

    Guests that run there keep running. HOST is a host, or one of its NUMA nodes such as host1-n0. Only root and the account of
    Slurm's controller may drain hosts. The command returns after 6 s, when the controller has saved the request.
    """
    _print_nodes(load_fleet("drain").drain(name, reason), as_json=as_json)


@click.command()
@click.argument("name", metavar="HOST")
@click.option("--force", is_flag=True, help="Also if the last health check of the host failed.")
@json_option
def resume(name: str, *, force: bool, as_json: bool) -> None:
    """Start guests on a host again.

    Refused while slurmd of the host does not respond, and while the health check of the host fails, which runs every minute.
    HOST is as for `nohype fleet drain`. A host that is in use stays as it is.
    """
    _print_nodes(load_fleet("drain").resume(name, force=force), as_json=as_json)


@click.command()
@click.argument("host")
@click.option("--host-is-off", is_flag=True, required=True, help="You have made sure that the host is off, and stays off.")
@quotas_option
@json_option
def requeue(host: str, *, host_is_off: bool, quotas: Path, as_json: bool) -> int:
    """Start the guests of a lost host elsewhere.

    Slurm cannot distinguish a host that is off from a host that is cut off and still runs its guests, which would run twice.
    Switch HOST off first (power, BMC). The command submits the lost guests that were submitted with --requeue, with the same
    request and a new id. Repeating the command starts no guest twice. Exit status 1 if a guest could not be submitted.
    """
    assert host_is_off
    outcomes = load_fleet("requeue").requeue(host, quotas)
    if as_json:
        print_json([asdict(outcome) for outcome in outcomes])
    elif outcomes:
        print_table([("NAME", "JOB", "OUTCOME"), *((outcome.name, outcome.job or "-", outcome.outcome) for outcome in outcomes)])
    else:
        say(f"no guest was lost with host {host}")
    return int(any(outcome.failed for outcome in outcomes))


@click.command()
@click.option("--end", metavar="NAME", help="Force this guest off, and release its resources.")
@click.option("--records", type=click.Path(path_type=Path), default="/var/lib/nohype/fleet", show_default=True, metavar="FOLDER",
              help="Folder with the guests of the jobs of this host.")  # fmt: skip
@json_option
@client_option
def orphans(end: str | None, records: Path, *, as_json: bool, client: Client) -> None:
    """List guests of this host that have no job, or end one.

    A host has them if they were created at the host and not with `nohype fleet submit`, or until the next health check has ended
    the guest of a job that the controller has forgotten. Slurm gives their resources to other guests, which the host then
    refuses. Run the command as root on the host.
    """
    work = load_fleet("check")
    found = [work.end_orphan(client, records, end)] if end else work.find_orphans(client, records)
    if as_json:
        print_json([asdict(orphan) for orphan in found])
    elif end:
        say(f"guest {end} has been ended")
    elif found:
        rows = ((guest.name, guest.state, guest.guest_id or "-", guest.node or "-", guest.job or "-") for guest in found)
        print_table([("NAME", "STATE", "ID", "HOST", "JOB"), *rows])
    else:
        say("no guests without a job")


def _describe_use(use: Any) -> dict[str, object]:
    amounts = {"cores": use.cores, "memory": use.memory, "vfs": use.vfs, "disks": use.disks}
    return {"guests": [place.guest for place in use.places], **amounts}


def _build_row(use: Any) -> Sequence[object]:
    node = use.node
    memory, disks = f"{use.memory}/{node.memory}M", f"{use.disks}/{node.disks}"
    amounts = (f"{use.cores}/{node.cores}", memory, f"{use.vfs}/{node.vfs}", disks)
    features = ",".join(node.features)
    return (
        node.name,
        node.state.lower(),
        len(use.places),
        *amounts,
        features,
        node.since or "-",
        node.by or "-",
        node.explanation or "-",
    )


def _print_nodes(nodes: Sequence[Any], *, as_json: bool) -> None:
    """The nodes that a command has changed."""
    if as_json:
        print_json([asdict(node) for node in nodes])
    else:
        rows = ((node.name, node.state.lower(), node.since or "-", node.by or "-", node.explanation or "-") for node in nodes)
        print_table([("HOST", "STATE", "SINCE", "BY", "REASON"), *rows])
