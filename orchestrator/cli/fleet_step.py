"""`nohype fleet step`: what Slurm runs on a host for each guest; see `orchestrator.fleet.steps`."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import syslog
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.connection import client_option
from orchestrator.cli.fleet_modules import load_fleet
from orchestrator.client import Client
from orchestrator.errors import OrchestratorError
from orchestrator.values import Size

_STOP_SECONDS = 20.0
"""Of the 30 s that Slurm gives the job script after SIGTERM (KillWait)."""
_TERMINATED = 143
_path = click.Path(path_type=Path, readable=False)  # the job script may not read the records, and does not


class _Terminated(BaseException):
    """Raised in the main thread by SIGTERM."""


@click.group(hidden=True)
def step() -> None:
    """Run a step of a guest's job on its host."""


def site_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes ``site``, where a command of the fleet runs on a host."""

    @click.option("--host", required=True, metavar="NAME", help="Name of the host in the fleet.")
    @click.option("--page-size", required=True, metavar="SIZE", help="Huge page size of the fleet.")
    @click.option("--configuration", type=_path, default="/etc/slurm", show_default=True, metavar="FOLDER",
                  help="Folder of Slurm's configuration.")  # fmt: skip
    @click.option("--records", type=_path, default="/var/lib/nohype/fleet", show_default=True, metavar="FOLDER",
                  help="Folder with the guests of the jobs of this host.")  # fmt: skip
    @client_option
    @functools.wraps(command)
    def run(*, host: str, page_size: str, configuration: Path, records: Path, client: Client, **options: Any) -> None:
        steps = load_fleet("steps")
        command(site=steps.Site(client, host, Size.parse(page_size), configuration, records), **options)

    return run


def _step_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes ``steps``, ``site``, the node's name and the job's number; an error is one line, with exit status 1."""

    @site_options
    @functools.wraps(command)
    def run(*, site: Any) -> None:
        steps = load_fleet("steps")
        node, job = os.environ.get("SLURMD_NODENAME", ""), os.environ.get("SLURM_JOB_ID", "")
        if not node or not job.isdigit():
            raise click.UsageError("SLURMD_NODENAME and SLURM_JOB_ID are not set: Slurm runs this command")
        try:
            command(steps, site, node, int(job))
        except OrchestratorError as error:
            line = steps.summarize(error)
            _log(f"{command.__name__} of job {job} on {node}: {line}")
            if command.__name__ == "prolog":
                steps.report_error(node, int(job), steps.What.REFUSED, error)
            if command.__name__ != "job":
                steps.drain(node, f"{command.__name__} of job {job}: {line}")
            sys.exit(1)

    return run


def _log(line: str) -> None:
    """slurmd does not keep what a step prints."""
    click.echo(f"nohype: {line}", err=True)
    syslog.openlog("nohype-fleet")
    syslog.syslog(syslog.LOG_ERR, line)


@step.command()
@_step_options
def prolog(steps: Any, site: Any, node: str, job: int) -> None:
    """Admit a job to the host.

    Compares the configuration with the host, and the allocation with the manager's guests.
    """
    steps.run_prolog(site, node, job)


@step.command()
@_step_options
def epilog(steps: Any, site: Any, node: str, job: int) -> None:
    """End the guest of a job, and release its place."""
    steps.run_epilog(site, node, job)


@step.command()
@_step_options
def job(steps: Any, site: Any, node: str, job: int) -> None:
    """Start the guest of a job, and wait for its end.

    The request is read from the standard input.
    """
    fields = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        steps.run_job(site, node, job, fields)
    except _Terminated:
        steps.stop_guest(site.client, fields["name"], fields["id"], _STOP_SECONDS)
        sys.exit(_TERMINATED)
    except OrchestratorError as error:
        steps.report_error(node, job, steps.What.FAILED, error)
        raise


@step.command()
@site_options
def check(site: Any) -> None:
    """Check the host, and end guests without a job.

    Ended are guests of jobs that the controller has forgotten, and jobs whose end it has forgotten. The findings are stored with
    the node. Exit status 1 if guests cannot be started, if a guest has no job, or if the controller does not respond. In the last
    case all guests keep running.
    """
    node = os.environ.get("SLURMD_NODENAME", "")
    if not node:
        raise click.UsageError("SLURMD_NODENAME is not set: give the name of the node with it")
    try:
        checked = load_fleet("check").check_host(site, node)
        forgotten = load_fleet("forgotten").end_forgotten_jobs(site.records, node)
        load_fleet("drain").return_to_service(node)
    except OrchestratorError as error:
        _log(f"{node} was not checked: {load_fleet('steps').summarize(error)}")
        sys.exit(1)
    for record in checked.ended:
        _log(f"guest {record.name} of job {record.job} was ended: the controller does not know the job")
    for number in forgotten:
        _log(f"job {number} was ended: its guest has ended before, and the controller forgot that")
    for finding in checked.findings:
        click.echo(f"nohype: {finding}", err=True)
    sys.exit(1 if checked.findings else 0)


def _terminate(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated
