"""Endpoints of quarantined guests."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from starlette.responses import Response

from orchestrator.api.backend import Served, answer_plain
from orchestrator.api.callers import HostReader, Operator
from orchestrator.api.fields import Boolean, IfMatch
from orchestrator.api.parameters import Query
from orchestrator.api.routes.guests import Name
from orchestrator.api.routing import CHANGE_CODES, HOST_CODES, Routes
from orchestrator.client import shapes

Force = Annotated[Boolean, Query(description="Release the resources even if cleanup is still not verified.")]

routes = Routes()


@routes.add("GET", "/v1/quarantine", list[shapes.Quarantined], HOST_CODES)
async def quarantined(backend: Served, caller: HostReader) -> Response:
    return await answer_plain(backend.quick, caller, lambda: backend.guests.quarantined(caller))


@routes.add("DELETE", "/v1/quarantine/{name}", None, CHANGE_CODES, status=204)
async def clear_quarantine(
    backend: Served, caller: Operator, name: Name, *, force: Force = False, if_match: IfMatch = None
) -> Response:
    version = await backend.choose_version(caller, name, if_match)
    await backend.changes.run(caller, partial(backend.guests.clear_quarantine, caller, name, version, force=force))
    return Response(status_code=204)
