"""Endpoints of external switches."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from starlette.responses import JSONResponse, Response

from orchestrator.api.backend import Served, answer_plain
from orchestrator.api.callers import Operator
from orchestrator.api.fields import Boolean
from orchestrator.api.parameters import Path, Query
from orchestrator.api.routing import HOST_CODES, Routes
from orchestrator.client import switch_shapes as shapes
from orchestrator.model.fields import NameField
from orchestrator.model.plain import to_plain
from orchestrator.model.switch_request import HairpinRequest, InterfaceField, SwitchRequest
from orchestrator.values import NAME

_READ_CODES = ("not-found", "switch", *HOST_CODES)
_CHANGE_CODES = ("cross-site", "conflict", *_READ_CODES)

Name = Annotated[
    NameField,
    Path(description="The switch's name.", json_schema_extra={"pattern": f"^{NAME}$"}),
]
Port = Annotated[InterfaceField | None, Query(description="A port; without it, all ports of uplinks.")]
Force = Annotated[Boolean, Query(description="Forget the switch even if its ports cannot be restored.")]

routes = Routes()


@routes.add("GET", "/v1/switches", list[shapes.SwitchView], HOST_CODES)
async def switches(backend: Served, caller: Operator) -> Response:
    return await answer_plain(backend.quick, caller, lambda: backend.guests.switches.list(caller))


@routes.add("POST", "/v1/switches", shapes.SwitchView, _CHANGE_CODES, status=201)
async def add_switch(backend: Served, caller: Operator, request: SwitchRequest) -> Response:
    view = await backend.switches.run(caller, backend.guests.switches.add, caller, request)
    return JSONResponse(to_plain(view), 201, {"Location": f"/v1/switches/{request.name}"})


@routes.add("GET", "/v1/switches/{name}", shapes.SwitchDetails, _READ_CODES)
async def switch(backend: Served, caller: Operator, name: Name) -> Response:
    return await answer_plain(backend.switches, caller, lambda: backend.guests.switches.show(caller, name))


@routes.add("GET", "/v1/switches/{name}/verify", list[shapes.SwitchCheck], _READ_CODES)
async def verify_switch(backend: Served, caller: Operator, name: Name, port: Port = None) -> Response:
    return await answer_plain(backend.switches, caller, lambda: backend.guests.switches.verify(caller, name, port))


@routes.add("POST", "/v1/switches/{name}/hairpin", shapes.SwitchState, _CHANGE_CODES)
async def set_hairpin(backend: Served, caller: Operator, name: Name, body: HairpinRequest) -> Response:
    return await answer_plain(backend.switches, caller, lambda: backend.guests.switches.set_hairpin(caller, name, body))


@routes.add("DELETE", "/v1/switches/{name}", None, _CHANGE_CODES, status=204)
async def delete_switch(backend: Served, caller: Operator, name: Name, *, force: Force = False) -> Response:
    await backend.switches.run(caller, partial(backend.guests.switches.delete, caller, name, force=force))
    return Response(status_code=204)
