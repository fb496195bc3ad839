"""Endpoints of signed evidence and of the event log's hash chain."""

from __future__ import annotations

from typing import Annotated

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.backend import Records, Served, answer_plain
from orchestrator.api.callers import HostReader
from orchestrator.api.fields import Integer
from orchestrator.api.limits import Kind
from orchestrator.api.parameters import Query
from orchestrator.api.routes.host import Frames
from orchestrator.api.routing import HOST_CODES, Routes
from orchestrator.api.waits import while_connected
from orchestrator.client import shapes
from orchestrator.errors import Forbidden, NotFound
from orchestrator.model.access import Role

Nonce = Annotated[
    str, Query(pattern=r"^[0-9A-Za-z._:-]{0,128}$", description="Is repeated in the evidence, which so cannot be an older one.")
]
At = Annotated[Integer | None, Query(ge=0, le=(1 << 63) - 1, description="An event whose hash is returned.")]

routes = Routes()


@routes.add("GET", "/v1/evidence", shapes.SignedEvidence, ("conflict", "not-found", *HOST_CODES), kind=Kind.WAIT)
async def evidence(backend: Served, request: Request, caller: HostReader, frames: Frames = 0, nonce: Nonce = "") -> Response:
    if frames and caller.role is not Role.OPERATOR:
        raise Forbidden(f"{caller.name} may not send test frames: operator role required", "omit `frames`")
    signed = backend.audits.run(caller, _find(backend.records).sign, frames, nonce)
    return Response(await while_connected(request.receive, signed), media_type="application/json")


@routes.add("GET", "/v1/events/chain", shapes.EventChain, ("not-found", *HOST_CODES))
async def event_chain(backend: Served, caller: HostReader, at: At = None) -> Response:
    records = _find(backend.records)
    return await answer_plain(backend.long, caller, lambda: records.verify_events(at))


def _find(records: Records | None) -> Records:
    if records is None:
        raise NotFound("this manager signs no evidence")
    return records
