"""`nohype exits`: the VM exits of a guest by hardware reason."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Literal

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.names import complete_guest
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.cli.seconds import Seconds
from orchestrator.client import Client
from orchestrator.client.shapes import ExitReport, VcpuExits
from orchestrator.model.exit_reasons import group_by_class

_Counts = list[Mapping[str, float]]
"""Exits, or exits per second, by name; one mapping per vCPU."""


@click.command()
@click.argument("guest", shell_complete=complete_guest)
@click.option("--by", type=click.Choice(["reason", "class", "vcpu"]), default="reason", show_default=True,
              help="Add up the exits by hardware reason, by class of reasons, or by vCPU.")  # fmt: skip
@click.option("--phase", type=click.Choice(["boot", "run"]), help="Only the exits until the guest's boot was over, or since.")
@click.option("--watch", is_flag=True, help="Print exits per second repeatedly, until interrupted.")
@click.option("--interval", type=Seconds(min=0.1, max=3600), default=5.0, show_default=True, metavar="SECONDS",
              help="Time between two prints of --watch.")  # fmt: skip
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values, for spreadsheets.")
@json_option
@client_option
def exits(
    guest: str, *, by: str, phase: Literal["boot", "run"] | None, watch: bool, interval: float, as_csv: bool, as_json: bool,
    client: Client,
) -> None:  # fmt: skip
    """Show the VM exits of a guest by hardware reason.

    They are counted since GUEST started, with --phase run since its boot was over (`nohype guest show` says when).

    A VM exit is a return from the guest to the host's kernel (KVM). The kernel counts them itself: no program reads them on the
    cores of guests. The names of the reasons are those of KVM for this CPU vendor (SVM: io, msr, hlt, npf; VMX: IO_INSTRUCTION,
    MSR_WRITE, HLT, EPT_VIOLATION). If the kernel cannot count reasons, the command says why, and shows the total.
    """
    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    if as_json and by != "reason" and not watch:
        raise click.UsageError("--json without --watch prints the reasons of each vCPU: omit --by")
    if watch and phase:
        raise click.UsageError("--watch prints what happens now: omit --phase")
    write: _Print = _write_csv if as_csv else _print_table
    if watch:
        for seconds, counts in _read_rates(client, guest, interval, by):
            stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
            if as_json:
                rates = [{name: round(rate, 2) for name, rate in vcpu.items()} for vcpu in counts]
                click.echo(json.dumps({"time": stamp, "seconds": round(seconds, 3), "rates": rates}))
            else:
                write(by, counts, stamp)
        return
    report = client.exits(guest, phase=phase)
    if as_json:
        print_json(report)
        return
    write(by, [_group(vcpu, by) for vcpu in report["vcpus"]], "")
    if not as_csv:
        _explain(report)


_Print = Callable[[str, _Counts, str], None]


def _read_rates(client: Client, guest: str, interval: float, by: str) -> Iterator[tuple[float, _Counts]]:
    before, read_at = client.exits(guest), time.monotonic()
    if before["why"]:
        say(before["why"])
    while True:
        time.sleep(interval)
        after, now = client.exits(guest), time.monotonic()
        yield now - read_at, _measure_rates(before, after, now - read_at, by)
        before, read_at = after, now


def _measure_rates(before: ExitReport, after: ExitReport, seconds: float, by: str) -> _Counts:
    """A count that fell belongs to a guest that was restarted: counted from 0."""
    if len(before["vcpus"]) != len(after["vcpus"]):
        before = {"vcpus": [{"total": 0, "reasons": {}, "uncounted": 0} for _ in after["vcpus"]], "why": ""}
    rates: _Counts = []
    for earlier, later in zip(before["vcpus"], after["vcpus"], strict=True):
        old, new = _group(earlier, by), _group(later, by)
        restarted = any(new.get(name, 0) < count for name, count in old.items())
        rates.append({name: (count - (0 if restarted else old.get(name, 0))) / seconds for name, count in new.items()})
    return rates


def _group(vcpu: VcpuExits, by: str) -> Mapping[str, float]:
    if by == "vcpu" or vcpu["reasons"] is None:
        return {} if vcpu["total"] is None else {"total": vcpu["total"]}
    return group_by_class(vcpu["reasons"]) if by == "class" else vcpu["reasons"]


def _print_table(by: str, counts: _Counts, stamp: str) -> None:
    totals: dict[str, float] = {}
    for vcpu in counts:
        for name, count in vcpu.items():
            totals[name] = totals.get(name, 0) + count
    rows = [
        (name, *(_format(vcpu.get(name, 0)) for vcpu in counts), _format(total))
        for name, total in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    ]
    heading = ("EXITS" if by == "vcpu" else by.upper(), *(f"VCPU {index}" for index in range(len(counts))), "ALL")
    if stamp:
        say(f"{stamp}, exits per second")
    print_table([heading, *rows])


def _write_csv(by: str, counts: _Counts, stamp: str) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if not stamp:
        writer.writerow(("vcpu", by if by != "vcpu" else "exits", "count"))
    for index, vcpu in enumerate(counts):
        for name, count in sorted(vcpu.items()):
            writer.writerow((*([stamp] if stamp else []), index, name, _format(count)))
    sys.stdout.flush()


def _format(count: float) -> str:
    return str(count) if isinstance(count, int) else f"{count:.1f}"


def _explain(report: ExitReport) -> None:
    if report["why"]:
        say(f"reasons not measured: {report['why']}")
    earlier = {index: vcpu["uncounted"] for index, vcpu in enumerate(report["vcpus"]) if vcpu["uncounted"]}
    # KVM counts an exit some instructions after the tracepoint has.
    if any(count > 1 for count in earlier.values()):
        where = ", ".join(f"vCPU {index}: {count}" for index, count in earlier.items())
        say(f"before reasons were counted ({where})")
