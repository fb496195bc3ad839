"""`nohype fleet submit`, `list`, `show`, `logs` and `cancel`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.fleet_modules import load_fleet
from orchestrator.cli.output import json_option, print_json, print_table, say
from orchestrator.cli.request_options import build_request, request_options
from orchestrator.cli.seconds import Seconds

quotas_option = click.option(
    "--quotas", type=click.Path(path_type=Path), default="/etc/nohype/fleet.toml", show_default=True, metavar="FILE",
    help="File with the quotas of the tenants.",
)  # fmt: skip
tenant_option = click.option("--tenant", metavar="NAME", help="Count what is submitted against the quota of this tenant.")


def wait_options(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option("--timeout", type=Seconds(0), metavar="SECONDS",
                               help="With --wait: fail after this long.  [default: wait indefinitely]")(command)  # fmt: skip
        return click.option("--wait", is_flag=True, help=f"Wait until {what}.")(command)

    return decorate


@click.command()
@click.argument("name")
@request_options
@click.option("--feature", "features", multiple=True, metavar="NAME",
              help="Require this feature of the host; can be repeated. `nohype fleet hosts` shows them.")  # fmt: skip
@click.option("--minutes", type=click.IntRange(1), metavar="NUMBER",
              help="End the guest this long after its start.  [default: never]")  # fmt: skip
@click.option("--anti-affinity", "group", metavar="GROUP",
              help="Never run the guest on a host that runs another guest of this group.")  # fmt: skip
@click.option("--deadline", metavar="TIME",
              help="End the guest by this time, such as 2030-01-31T18:00 (local) or 2030-01-31T18:00Z. Withdraw it if it cannot "
                   "start in time: --minutes before, or else one minute.")  # fmt: skip
@tenant_option
@quotas_option
@click.option(
    "--requeue", is_flag=True,
    help="Let `nohype fleet requeue` start the guest on another host after the loss of its host; what its disks held is lost.",
)  # fmt: skip
@wait_options("the guest has reported ready, and fail if it ends before")
@json_option
def submit(
    name: str,
    *,
    features: tuple[str, ...],
    minutes: int | None,
    group: str | None,
    deadline: str | None,
    tenant: str | None,
    quotas: Path,
    requeue: bool,
    wait: bool,
    timeout: float | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Submit a guest to the fleet.

    The guest starts as soon as a host has room for it, usually within a second. The command returns after 6 s, when the
    controller has saved it; with --tenant after 12 s. Repeating the command with the same --id never starts a second guest. NAME,
    and the request, are as for `nohype guest create`; network disks, serial numbers of disks, caches, secrets and a placement
    cannot be requested.

    With --wait, a guest whose image reports ready only by answering SSH is ready when it runs. A guest that is not ready in time
    stays in the fleet.
    """
    check_wait(wait=wait, timeout=timeout)
    work = load_fleet("submit")
    wish = load_fleet("wish").read_wish(
        build_request(name, fields), features, minutes, group=group, deadline=deadline, tenant=tenant or "", requeue=requeue
    )
    quota = () if tenant is None else (load_fleet("quota").read_quota(quotas, tenant),)
    click.echo(f"guest id: {wish.guest_id}", err=True)
    job = work.submit(wish, *quota)
    _show(load_fleet("follow").wait_ready(name, wish.guest_id, timeout) if wait else job, as_json=as_json)


@click.command("list")
@json_option
def list_guests(*, as_json: bool) -> None:
    """List the guests of the fleet.

    Guests that have ended within the last hour are included.
    """
    jobs = load_fleet("slurm").read_jobs()
    if as_json:
        print_json([asdict(job) for job in jobs])
    elif jobs:
        rows = (
            (job.name, job.state.lower(), job.node or "-", job.number, job.tenant or "-", job.guest_id, job.explanation or "-")
            for job in jobs
        )
        print_table([("NAME", "STATE", "HOST", "JOB", "TENANT", "ID", "REASON"), *rows])
    else:
        say("no guests")


@click.command()
@click.argument("name")
@json_option
def show(name: str, *, as_json: bool) -> None:
    """Show a guest of the fleet.

    The reason is why it waits, or why it has ended.
    """
    _show(load_fleet("submit").find_job(name), as_json=as_json)


@click.command()
@click.argument("name")
@json_option
def logs(name: str, *, as_json: bool) -> None:
    """Show what happened to a guest of the fleet.

    What Slurm and the guest's host reported, for an hour after its end. Of long reports the oldest are left out. More is in the
    journal of the host (`journalctl -t nohype-fleet`), and in the events of its manager (`nohype events`).
    """
    entries = load_fleet("follow").read_log(load_fleet("submit").find_job(name))
    if as_json:
        print_json([asdict(entry) for entry in entries])
    else:
        print_table([("TIME", "WHAT", "TEXT"), *((entry.time, entry.what, entry.text) for entry in entries)])


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@wait_options("the guests have ended and their resources are released")
@json_option
def cancel(names: tuple[str, ...], *, wait: bool, timeout: float | None, as_json: bool) -> None:
    """End guests, or withdraw them from the queue.

    A guest that runs is shut down; after 20 s it is forced off. The command returns after 6 s, when the controller has saved the
    request. If the fleet does not have one of the guests, none is ended.
    """
    check_wait(wait=wait, timeout=timeout)
    names = tuple(dict.fromkeys(names))
    jobs = load_fleet("submit").cancel(*names)
    if wait:
        jobs = load_fleet("follow").wait_ended(jobs, timeout)
    if as_json:
        print_json([asdict(job) for job in jobs])
    else:
        say("\n".join(f"guest {job.name} {'has ended' if job.has_ended else 'is being ended'}" for job in jobs))


def check_wait(*, wait: bool, timeout: float | None) -> None:
    if timeout is not None and not wait:
        raise click.UsageError("--timeout requires --wait")


def _show(job: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(job))
        return
    lines = {
        "name": job.name, "id": job.guest_id, "state": job.state.lower(), "host": job.node, "job": job.number,
        "tenant": job.tenant, "submitted": job.submitted, "started": job.started, "ended": job.ended, "reason": job.explanation,
    }  # fmt: skip
    say("\n".join(f"{key + ':':<11}{value or '-'}" for key, value in lines.items()))
