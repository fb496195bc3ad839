"""Whether a guest could be created now: `nohype top --plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import click

from orchestrator.cli.top_pages import PlanResult
from orchestrator.client import Client
from orchestrator.client.transport import Unreachable
from orchestrator.errors import Conflict, GuestError, ImageError, NoRoom, NotFound, OrchestratorError, QuotaExceeded, RequestError

Request = Mapping[str, object]
_REFUSALS = (Conflict, GuestError, ImageError, NoRoom, NotFound, QuotaExceeded, RequestError)


def parse_request(_ctx: click.Context, _param: click.Parameter, file: IO[bytes] | None) -> Request | None:
    """The fields in the file. Raises RequestError unless it holds a JSON object."""
    if file is None:
        return None
    try:
        found: Any = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file.name} is not JSON: {error}", "write the fields of `POST /v1/plans` as a JSON object") from None
    if not isinstance(found, dict):
        raise RequestError(f"{file.name} is not a JSON object", "write the fields of `POST /v1/plans` as a JSON object")
    return found


def ask_plan(client: Client, request: Request | None) -> PlanResult | None:
    """Claims nothing. Raises OrchestratorError if the manager cannot decide."""
    if request is None:
        return None
    name = request.get("name")
    try:
        guest = client.plan(request)
    except Unreachable:
        raise
    except _REFUSALS as error:
        return PlanResult(
            fits=False, text=f"plan {name}: refused now: {error.message.partition(chr(10))[0]}", reasons=list_reasons(error)
        )
    nics = ", ".join(nic["address"] or nic["interface"] for nic in guest["nics"])
    text = f"plan {name}: fits now: CPUs {', '.join(guest['cores'])} of node {guest['node']}, NIC {nics}"
    return PlanResult(fits=True, text=text, reasons=guest["warnings"])


def list_reasons(error: OrchestratorError) -> list[str]:
    """One per candidate, or the hint."""
    reasons = error.reasons if isinstance(error, NoRoom) else ()
    return list(reasons) or ([error.hint] if error.hint else [])
