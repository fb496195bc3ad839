"""Endpoints of tenant networks."""

from __future__ import annotations

from typing import Annotated

from starlette.responses import JSONResponse, Response

from orchestrator.api.backend import Served, answer_plain
from orchestrator.api.callers import Caller, Writer
from orchestrator.api.parameters import Path
from orchestrator.api.routing import HOST_CODES, Routes
from orchestrator.client import shapes
from orchestrator.model.fields import NameField
from orchestrator.model.network import NetworkRequest, NetworkView
from orchestrator.values import NAME

NetworkName = Annotated[
    NameField,
    Path(description="The network's name.", json_schema_extra={"pattern": f"^{NAME}$"}),
]

routes = Routes()


@routes.add("GET", "/v1/networks", list[shapes.Network], HOST_CODES)
async def networks(backend: Served, caller: Caller) -> Response:
    def read() -> list[shapes.Network]:
        return [show_network(view) for view in backend.guests.networks.list(caller)]

    return await answer_plain(backend.quick, caller, read)


@routes.add(
    "POST",
    "/v1/networks",
    shapes.Network,
    ("cross-site", "conflict", "no-room", "quota", *HOST_CODES),
    status=201,
    repeatable=True,
)
async def create_network(backend: Served, caller: Writer, request: NetworkRequest) -> Response:
    view, new = await backend.quick.run(caller, backend.guests.networks.create, caller, request)
    return JSONResponse(show_network(view), 201 if new else 200, {"Location": f"/v1/networks/{request.name}"})


@routes.add("GET", "/v1/networks/{name}", shapes.Network, ("not-found", *HOST_CODES))
async def network(backend: Served, caller: Caller, name: NetworkName) -> Response:
    return JSONResponse(show_network(await backend.quick.run(caller, backend.guests.networks.show, caller, name)))


@routes.add("DELETE", "/v1/networks/{name}", None, ("cross-site", "not-found", "conflict", "lost-race", *HOST_CODES), status=204)
async def delete_network(backend: Served, caller: Writer, name: NetworkName) -> Response:
    await backend.quick.run(caller, backend.guests.networks.delete, caller, name)
    return Response(status_code=204)


def show_network(view: NetworkView) -> shapes.Network:
    network = view.network
    return {"name": network.name, "vlan": network.vlan, "owner": network.owner, "guests": list(view.guests)}
