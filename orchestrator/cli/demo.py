"""`nohype demo`: the end-to-end demo in a lab."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.audit import print_proofs
from orchestrator.cli.output import print_json, print_table
from orchestrator.cli.progress import show_progress
from orchestrator.lab import control
from orchestrator.lab.accel import AccelChoice
from orchestrator.lab.demo import Report, run_demo
from orchestrator.lab.fleet_demo import FleetReport, run_fleet_demo
from orchestrator.lab.fleet_setup import PACKAGES
from orchestrator.lab.lab import Lab, build_ssh, keeping_connection
from orchestrator.lab.spec import DEFAULT_SPEC, load_spec
from orchestrator.lab.start import attached_lab, start_lab

NAME = "demo"
FLEET_NAMES, FLEET_SPEC = ("fleet1", "fleet2"), "small"


@click.command()
@click.option("--keep", is_flag=True, help="Leave the lab up, and print how to log in.")
@click.option(
    "--fleet", is_flag=True, help="The demo of a fleet: two labs as two hosts, guests that Slurm places, and the loss of a host."
)
@click.option("--report", "path", type=click.Path(path_type=Path), help="Also write the report to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
def demo(*, keep: bool, fleet: bool, path: Path | None, as_json: bool) -> int:
    """Run the end-to-end demo in the nested lab.

    Starts a lab, creates two guests, measures all proofs, deletes the guests, and compares the host before and after.

    With --fleet, starts two labs behind one switch and makes them a fleet. Submits guests, measures all proofs on both hosts,
    pings between the hosts, kills one host, and requeues the guests whose policy allows it. The labs are removed in each case,
    also if this program is killed.

    Exit status 0 only if every proof passed, and 3 if the lab was lost: that is neither a pass nor a failure.
    """
    if fleet and keep:
        raise click.UsageError("--keep cannot be used with --fleet")
    if fleet:
        return _demonstrate_fleet(path, as_json=as_json)
    with show_progress() as timeline:
        lab = start_lab(NAME, load_spec(DEFAULT_SPEC), AccelChoice.AUTO, timeline)
        try:
            report = run_demo(lab, timeline)
        finally:
            if keep:
                _print_login(lab)
            else:
                with timeline.stage("lab down"):
                    control.down(NAME)
    return _finish(report, path, as_json=as_json)


def _demonstrate_fleet(path: Path | None, *, as_json: bool) -> int:
    with show_progress() as timeline, ExitStack() as stack:
        labs: list[Lab] = []
        for name in FLEET_NAMES:
            timeline.note(f"lab {name}")
            switch_of = FLEET_NAMES[0] if labs else ""
            lab = attached_lab(
                name, load_spec(FLEET_SPEC), AccelChoice.AUTO, timeline, packages=PACKAGES, switch_of=switch_of
            )  # fmt: skip
            labs.append(stack.enter_context(keeping_connection(stack.enter_context(lab))))
        report = run_fleet_demo(labs, timeline)
    return _finish(report, path, as_json=as_json)


def _finish(report: Report | FleetReport, path: Path | None, *, as_json: bool) -> int:
    if path:
        report.write(path)
    if as_json:
        print_json(vars(report))
    elif isinstance(report, FleetReport):
        _print_fleet(report)
    else:
        _print(report)
    if not as_json:
        total = sum(report.timings.values())
        click.echo(f"\n{report.verdict.upper()} after {total:.0f} s" + (f"; report: {path}" if path else ""))
    return int(report.verdict != "pass")


def _print_login(lab: Lab) -> None:
    # To standard error, which keeps the JSON report clean. Also after a failure, when it is needed most.
    click.echo(f"Lab {NAME} is up. Log in: nohype lab exec --lab {NAME} -- COMMAND, or\n  {' '.join(build_ssh(lab))}", err=True)
    click.echo(f"Stop it: nohype lab down {NAME}\n", err=True)


def _print(report: Report) -> None:
    click.echo()
    print_table([("GUEST", "CPUS", "NODE", "VF", "MAC", "READY"), *(_row(guest) for guest in report.guests)])
    click.echo(f"\n{report.guests[0]['name']} pings {report.guests[-1]['name']}, through the external switch:")
    click.echo(f"  {report.guests[0]['ping']}\n")
    print_proofs(report.proofs)


def _print_fleet(report: FleetReport) -> None:
    for host in report.hosts:
        click.echo(f"\nHost {host['name']}, guests: {', '.join(guest['name'] for guest in host['guests'])}\n")
        print_proofs(host["proofs"])
    click.echo("\nFleet\n")
    for check in report.checks:
        click.echo(f"{'PASS' if check['passed'] else 'FAIL'}  {check['name']}\n      {check['evidence']}")


def _row(guest: dict[str, Any]) -> tuple[object, ...]:
    ready = guest["ready"].removeprefix("nohype: ready ")
    return guest["name"], ",".join(guest["cores"]), guest["node"], guest["nics"][0]["address"], guest["nics"][0]["mac"], ready
