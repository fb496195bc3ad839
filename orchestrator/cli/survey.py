"""`nohype survey`: shows the resources of the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import format_size, json_option, print_json, print_table, say
from orchestrator.client import Client


@click.command()
@json_option
@client_option
def survey(*, as_json: bool, client: Client) -> None:
    """Show cores, huge pages, NICs and disks of the host.

    The manager reads them from the live host. The command also shows differences between the manager's configuration and the
    host.
    """
    found = client.survey()
    if as_json:
        print_json(found)
        return
    print_table([("CORE", "SOCKET", "NODE"), *((core["cpus"], core["socket"], core["node"]) for core in found["cores"])])
    say(f"isolated CPUs: {found['isolated'] or 'none'}\n")
    pools = ((pool["node"], format_size(pool["page_size"]), pool["total"], pool["free"]) for pool in found["pools"])
    print_table([("NODE", "PAGE", "TOTAL", "FREE"), *pools])
    for promise in found.get("promised", ()):
        size = format_size(promise["page_size"])
        say(f"reserved by programs, but counted as free: {promise['count']} huge pages of {size}")
    click.echo()
    heading = ("PF", "INTERFACE", "DEVICE", "DRIVER", "NODE", "LINK", "VFS")
    print_table([heading, *(_pf_row(pf) for pf in found["pfs"])])
    _print_disks(found.get("controllers", ()))
    for line in _find_unusable(found):
        say(line)
    say(f"\nIOMMU groups: {len(found['iommu_groups'])}")
    say(f"KVM: {'available' if found.get('kvm', True) else 'not available'}")
    for finding in found.get("findings", ()):
        say(f"{finding['severity']}: {finding['text']}\n  hint: {finding['hint']}")


def _find_unusable(found: Mapping[str, Any]) -> Iterator[str]:
    """One line per NIC function or IOMMU group that guests cannot get, with the reason."""
    for pf in found["pfs"]:
        if pf["fault"]:
            yield f"PF {pf['address']}: {pf['fault']}"
        if any(port["representor"] for port in pf["siblings"]):
            yield f"PF {pf['address']}: switchdev mode; VEPA requires legacy mode"
        yield from (f"VF {vf['address']} is used by the host: {vf['use']}" for vf in pf["vfs"] if vf["use"])
    for disk in found.get("controllers", ()):
        name = f"NVMe controller {disk['serial'] or disk['address']}"
        yield from (f"{name}: {reason}" for reason in (disk["fault"], *disk["uses"], *disk["signatures"]) if reason)
    yield from (f"IOMMU group {group['number']}: {group['fault']}" for group in found["iommu_groups"] if group["fault"])


def _print_disks(disks: Sequence[Mapping[str, Any]]) -> None:
    if disks:
        rows = [
            (
                disk["serial"] or "-",
                disk["address"],
                format_size(sum(one["size"] for one in disk["namespaces"])) if disk["namespaces"] else "-",
                "-" if disk["node"] is None else disk["node"],
                disk["driver"] or "-",
                disk["model"] or "-",
            )
            for disk in disks
        ]
        click.echo()
        print_table([("NVME", "ADDRESS", "SIZE", "NODE", "DRIVER", "MODEL"), *rows])


def _pf_row(pf: Mapping[str, Any]) -> tuple[object, ...]:
    vfs = f"{len(pf['vfs'])} of {pf['total_vfs']}"
    node = "-" if pf["node"] is None else pf["node"]
    return pf["address"], pf["interface"] or "-", pf["device"], pf["driver"] or "-", node, "up" if pf["up"] else "down", vfs
