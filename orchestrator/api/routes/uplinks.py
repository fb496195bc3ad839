"""Endpoints of the uplinks: edge modes, and the probe of the external switch."""

from __future__ import annotations

from typing import Annotated

from starlette.responses import Response

from orchestrator.api.backend import Served, answer_plain
from orchestrator.api.callers import HostReader, Operator
from orchestrator.api.parameters import Path
from orchestrator.api.routing import HOST_CODES, Routes
from orchestrator.client import shapes
from orchestrator.model.uplink_request import UplinkRequest

Name = Annotated[str, Path(description="The uplink's network interface.", max_length=64)]

routes = Routes()


@routes.add("GET", "/v1/uplinks", list[shapes.Uplink], HOST_CODES)
async def uplinks(backend: Served, caller: HostReader) -> Response:
    return await answer_plain(backend.long, caller, lambda: backend.guests.uplinks(caller))


@routes.add("GET", "/v1/uplinks/{name}", shapes.Uplink, ("not-found", *HOST_CODES))
async def show_uplink(backend: Served, caller: HostReader, name: Name) -> Response:
    return await answer_plain(backend.long, caller, lambda: backend.guests.uplink(caller, name))


@routes.add("POST", "/v1/uplinks/{name}/edge", shapes.Uplink, ("cross-site", "conflict", "not-found", *HOST_CODES))
async def set_uplink(backend: Served, caller: Operator, name: Name, body: UplinkRequest) -> Response:
    return await answer_plain(backend.long, caller, lambda: backend.guests.set_uplink(caller, name, body.edge))


@routes.add("POST", "/v1/uplinks/{name}/prove", shapes.HairpinResult, ("cross-site", "not-found", *HOST_CODES))
async def prove_uplink(backend: Served, caller: Operator, name: Name) -> Response:
    return await answer_plain(backend.long, caller, lambda: backend.guests.prove_uplink(caller, name))
