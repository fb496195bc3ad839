"""Endpoint of a guest's VM exits."""

from __future__ import annotations

from starlette.responses import Response

from orchestrator.api.backend import Served, answer_plain
from orchestrator.api.callers import Caller
from orchestrator.api.routes.guests import Name
from orchestrator.api.routing import HOST_CODES, Routes
from orchestrator.client import shapes

routes = Routes()


@routes.add("GET", "/v1/guests/{name}/exits", shapes.ExitReport, ("not-found", "guest", *HOST_CODES))
async def exits(backend: Served, caller: Caller, name: Name) -> Response:
    return await answer_plain(backend.quick, caller, lambda: backend.guests.exits.read(caller, name))
