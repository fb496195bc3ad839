"""`nohype fleet submit-all`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import click

from orchestrator.cli.fleet_guests import check_wait, quotas_option, tenant_option, wait_options
from orchestrator.cli.fleet_modules import load_fleet
from orchestrator.cli.output import json_option, print_json, print_table
from orchestrator.errors import RequestError


@click.command("submit-all")
@click.argument("file", type=click.File("rb"))
@click.option("--id", "prefix", metavar="ID", help="Prefix of ids: a guest without an id gets ID:NAME.  [default: a new one]")
@click.option(
    "--only-ended",
    is_flag=True,
    help="Submit guests again that have ended, and leave those as they are that wait or run, whatever their ids are.",
)
@tenant_option
@quotas_option
@wait_options("the guests have reported ready; those that end before are errors")
@json_option
def submit_all(
    file: BinaryIO, *, prefix: str | None, only_ended: bool, tenant: str | None, quotas: Path, wait: bool,
    timeout: float | None, as_json: bool,
) -> int:  # fmt: skip
    """Submit all guests of a file to the fleet.

    FILE, or - for standard input, is a JSON list with one object per guest: the fields of a request to the manager (see the API),
    and features, minutes, anti_affinity, deadline and requeue, which are the options of `nohype fleet submit`.

    All guests are checked before the first is submitted; if one is refused, none is submitted. The command returns 6 s after the
    last submission, when the controller has saved them; with --tenant after 12 s. Repeating it with the same ids, or the same
    --id, never starts a guest twice. A guest that has ended, or was refused because the controller was killed, needs a new id:
    give another --id, and --only-ended. Exit status 1 if a guest was not submitted, could not be started, or with --wait is
    not ready.
    """
    check_wait(wait=wait, timeout=timeout)
    if prefix == "":  # such as that of a variable that is not set; a new one for each command would start guests again
        raise click.UsageError("--id is empty")
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"the guests are not UTF-8: {error.reason}", "write a JSON list of guests") from None
    work = load_fleet("batch")
    prefix = prefix or uuid4().hex[:16]
    wishes = work.read_batch(text, prefix, tenant or "")
    quota = () if tenant is None else (load_fleet("quota").read_quota(quotas, tenant),)
    if any(wish.guest_id.startswith(f"{prefix}:") for wish in wishes):
        click.echo(f"to repeat the command: --id {prefix}", err=True)
    outcomes = work.submit_batch(wishes, *quota, only_ended=only_ended)
    if wait:
        outcomes = work.wait_batch(outcomes, timeout)
    if as_json:
        print_json([asdict(outcome) for outcome in outcomes])
    else:
        rows = ((one.name, one.state.lower() or "-", one.job or "-", one.guest_id, one.error or "-") for one in outcomes)
        print_table([("NAME", "STATE", "JOB", "ID", "ERROR"), *rows])
    return int(any(outcome.error for outcome in outcomes))
