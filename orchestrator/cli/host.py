"""`nohype survey` and `nohype audit`: what the host has, and what is proved of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.output import format_size, json_option, print_json, print_table, say
from orchestrator.client.client import Client
from orchestrator.model.proof import WEAKER


@click.command()
@json_option
@client_option
def survey(*, as_json: bool, client: Client) -> None:
    """Show what the host has.

    Cores with their NUMA nodes, huge pages, network functions and IOMMU groups, read at this moment; and where the manager's
    configuration does not fit them.
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
        say(f"reserved by programs, and shown as free on some node: {promise['count']} huge pages of {size}")
    click.echo()
    heading = ("PF", "INTERFACE", "DEVICE", "DRIVER", "NODE", "LINK", "VFS")
    print_table([heading, *(_pf_row(pf) for pf in found["pfs"])])
    for line in _find_odd(found):
        say(line)
    say(f"\nIOMMU groups: {len(found['iommu_groups'])}")
    say(f"KVM: {'available' if found.get('kvm', True) else 'not available'}")
    for finding in found.get("findings", ()):
        say(f"{finding['severity']}: {finding['text']}\n  hint: {finding['hint']}")


@click.command()
@click.option("--frames", type=click.IntRange(0, 10_000), default=0, show_default=True, metavar="NUMBER",
              help="Frames to send from guest to guest for the proof `vepa`, not measured without; operators only.")  # fmt: skip
@json_option
@client_option
def audit(*, frames: int, as_json: bool, client: Client) -> int:
    """Measure all proofs on the live host.

    A proof passes, fails, or is not measured, which is not taken for a pass and not for a failure. Exit status 1 if one fails.
    """
    proofs = client.audit(frames)
    if as_json:
        print_json(proofs)
    else:
        print_proofs(proofs)
    return int(any(proof["verdict"] == "fail" for proof in proofs))


def print_proofs(proofs: Sequence[Mapping[str, Any]]) -> None:
    """A line for each proof, and under each that did not pass what was found."""
    rows = [(p["name"], p["subject"], p["verdict"].upper(), _figure(p["figure"]), p["unit"]) for p in proofs]
    print_table([("PROOF", "SUBJECT", "VERDICT", "FIGURE", "UNIT"), *rows])
    for proof in proofs:
        if proof["verdict"] != "pass":
            say(f"\n{proof['name']} ({proof['subject']}): {proof['verdict']}")
            for line in proof["evidence"][:8]:
                say(f"  {line}")
        for line in proof["evidence"] if proof["verdict"] == "pass" else ():
            if line.startswith(WEAKER):
                say(f"\n{proof['name']} ({proof['subject']}): {line}")


def _figure(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:g}"


def _find_odd(found: Mapping[str, Any]) -> Iterator[str]:
    """What of the network can't be a guest's, a line each with the reason."""
    for pf in found["pfs"]:
        if pf["fault"]:
            yield f"PF {pf['address']}: {pf['fault']}"
        if any(port["representor"] for port in pf["siblings"]):
            yield f"PF {pf['address']}: it is in switchdev mode, and VEPA needs the legacy mode"
        yield from (f"VF {vf['address']} is used by the host: {vf['use']}" for vf in pf["vfs"] if vf["use"])
    yield from (f"IOMMU group {group['number']}: {group['fault']}" for group in found["iommu_groups"] if group["fault"])


def _pf_row(pf: Mapping[str, Any]) -> tuple[object, ...]:
    vfs = f"{len(pf['vfs'])} of {pf['total_vfs']}"
    node = "-" if pf["node"] is None else pf["node"]
    return pf["address"], pf["interface"] or "-", pf["device"], pf["driver"] or "-", node, "up" if pf["up"] else "down", vfs
