"""`nohype doctor`: is this server fit?"""

from __future__ import annotations

import click

from orchestrator.cli.output import json_option
from orchestrator.doctor.__main__ import HOUSEKEEPING, examine
from orchestrator.errors import RequestError
from orchestrator.values import CpuSet


@click.command()
@click.option("--housekeeping", metavar="CPUS", help=f"{HOUSEKEEPING[0].upper()}{HOUSEKEEPING[1:]}.")
@json_option
def doctor(*, housekeeping: str | None, as_json: bool) -> int:
    """Check whether this server is fit for NoHype.

    Reads only, needs no manager, and shows for each check what was found, what is needed, and what to do. Without root some
    checks are not measured. Exit status: 0 fit; 1 a required check failed; 8 none failed, but not all were measured.
    """
    try:
        return examine(None if housekeeping is None else CpuSet.parse(housekeeping), as_json=as_json)
    except RequestError as error:  # not status 1, which is that of an unfit server
        raise click.BadParameter("; ".join(filter(None, (error.message, error.hint))), param_hint="--housekeeping") from None
