"""Endpoints of a guest's VM exits, and of the end of its boot."""

from __future__ import annotations

from typing import Annotated

from starlette.responses import Response

from orchestrator.api.backend import Served, answer_plain
from orchestrator.api.callers import Caller, Writer
from orchestrator.api.fields import IfMatch
from orchestrator.api.parameters import Query
from orchestrator.api.routes.guests import Name, answer_guest
from orchestrator.api.routing import CHANGE_CODES, HOST_CODES, Routes
from orchestrator.client import shapes
from orchestrator.model.disengagement import Phase

PhaseQuery = Annotated[Phase | None, Query(description="Only the exits until the guest's boot was over, or since.")]

routes = Routes()


@routes.add("GET", "/v1/guests/{name}/exits", shapes.ExitReport, ("not-found", "guest", *HOST_CODES))
async def exits(backend: Served, caller: Caller, name: Name, phase: PhaseQuery = None) -> Response:
    return await answer_plain(backend.quick, caller, lambda: backend.guests.exits.read(caller, name, phase))


@routes.add("POST", "/v1/guests/{name}/disengage", shapes.Guest, CHANGE_CODES, etag=True)
async def disengage(backend: Served, caller: Writer, name: Name, if_match: IfMatch = None) -> Response:
    version = await backend.choose_version(caller, name, if_match)
    await backend.changes.run(caller, backend.guests.disengagements.request, caller, name, version)
    return answer_guest(backend, await backend.quick.run(caller, backend.guests.guest, caller, name))
