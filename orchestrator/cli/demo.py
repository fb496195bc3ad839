"""`nohype demo`: the end-to-end demo in a lab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from orchestrator.cli.audit import print_proofs
from orchestrator.cli.output import print_json, print_table
from orchestrator.cli.progress import show_progress
from orchestrator.lab import control
from orchestrator.lab.accel import AccelChoice
from orchestrator.lab.demo import Report, run_demo
from orchestrator.lab.lab import Lab, build_ssh
from orchestrator.lab.spec import DEFAULT_SPEC, load_spec
from orchestrator.lab.start import start_lab

NAME = "demo"


@click.command()
@click.option("--keep", is_flag=True, help="Leave the lab up, and print how to log in.")
@click.option("--report", "path", type=click.Path(path_type=Path), help="Also write the report to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
def demo(*, keep: bool, path: Path | None, as_json: bool) -> int:
    """Run the end-to-end demo in the nested lab.

    Starts a lab, creates two guests, measures all proofs, deletes the guests, and compares the host before and after.

    Exit status 0 only if every proof passed, and 3 if the lab was lost: that is neither a pass nor a failure.
    """
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
    if path:
        report.write(path)
    if as_json:
        print_json(vars(report))
    else:
        _print(report, path)
    return int(report.verdict != "pass")


def _print_login(lab: Lab) -> None:
    # To standard error, which keeps the JSON report clean. Also after a failure, when it is needed most.
    click.echo(f"Lab {NAME} is up. Log in: nohype lab exec --lab {NAME} -- COMMAND, or\n  {' '.join(build_ssh(lab))}", err=True)
    click.echo(f"Stop it: nohype lab down {NAME}\n", err=True)


def _print(report: Report, path: Path | None) -> None:
    click.echo()
    print_table([("GUEST", "CPUS", "NODE", "VF", "MAC", "READY"), *(_row(guest) for guest in report.guests)])
    click.echo(f"\n{report.guests[0]['name']} pings {report.guests[-1]['name']}, through the external switch:")
    click.echo(f"  {report.guests[0]['ping']}\n")
    print_proofs(report.proofs)
    total = sum(report.timings.values())
    click.echo(f"\n{report.verdict.upper()} after {total:.0f} s" + (f"; report: {path}" if path else ""))


def _row(guest: dict[str, Any]) -> tuple[object, ...]:
    ready = guest["ready"].removeprefix("nohype: ready ")
    return guest["name"], ",".join(guest["cores"]), guest["node"], guest["nics"][0]["address"], guest["nics"][0]["mac"], ready
