"""Endpoints of the host: version, survey, proofs, metrics, OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator import __version__
from orchestrator.api.backend import Served, answer_plain
from orchestrator.api.callers import Caller, HostReader
from orchestrator.api.fields import Boolean, Integer
from orchestrator.api.limits import Kind
from orchestrator.api.parameters import Query
from orchestrator.api.routes.guests import show_guest
from orchestrator.api.routing import HOST_CODES, Routes
from orchestrator.api.waits import while_connected
from orchestrator.client import host_shapes, shapes
from orchestrator.errors import Forbidden, NotFound
from orchestrator.model.access import Role
from orchestrator.model.host_view import HostView
from orchestrator.model.plain import to_plain
from orchestrator.model.plan import Policy
from orchestrator.model.topology import Topology
from orchestrator.planning.host_check import check_host
from orchestrator.values import CpuSet

Frames = Annotated[Integer, Query(ge=0, le=10_000)]
HostOnly = Annotated[Boolean, Query(description="Leave out the proofs of guests.")]

routes = Routes()


@routes.add("GET", "/v1/version", shapes.Version)
async def version(_caller: Caller) -> Response:
    return JSONResponse({"version": __version__})


@routes.add("GET", "/v1/openapi.json", dict[str, object], documented=False)
async def openapi(backend: Served, caller: Caller) -> Response:
    return await answer_plain(backend.long, caller, backend.describe)


@routes.add("GET", "/v1/host", host_shapes.Host, HOST_CODES)
async def host(backend: Served, caller: HostReader) -> Response:
    def read() -> dict[str, Any]:
        setup = backend.guests.host_setup
        return show_host(backend.guests.host_views.read(), setup.housekeeping, setup.policy)

    return await answer_plain(backend.long, caller, read)


@routes.add("GET", "/v1/survey", shapes.Survey, HOST_CODES)
async def survey(backend: Served, caller: HostReader) -> Response:
    def read() -> dict[str, Any]:
        topology = backend.guests.survey_with_use()
        return show_survey(topology, backend.guests.host_setup.policy.housekeeping, backend.guests.compare(topology))

    return await answer_plain(backend.long, caller, read)


@routes.add("GET", "/v1/audit", list[shapes.Proof], ("conflict", *HOST_CODES), kind=Kind.WAIT)
async def proofs(
    backend: Served, request: Request, caller: HostReader, frames: Frames = 0, *, host_only: HostOnly = False
) -> Response:
    if frames and caller.role is not Role.OPERATOR:
        raise Forbidden(f"{caller.name} may not send test frames: operator role required", "omit `frames`")
    measured = answer_plain(backend.audits, caller, lambda: backend.measure(frames, host_only=host_only))
    return await while_connected(request.receive, measured)


@routes.add("GET", "/v1/metrics", str, ("not-found", *HOST_CODES), media="text/plain")
async def read_metrics(backend: Served, caller: HostReader) -> Response:
    if backend.metrics is None:
        raise NotFound("this manager has no metrics")
    page, media = await backend.quick.run(caller, backend.metrics)
    return Response(page, media_type=media)


def show_host(view: HostView, housekeeping: CpuSet, policy: Policy) -> dict[str, Any]:
    plain = {name: to_plain(value) for name, value in vars(view).items() if name not in ("guests", "topology")}
    findings = check_host(policy, view.topology)
    guests = [show_guest(guest, housekeeping) for guest in view.guests]
    return {**plain, "guests": guests, "survey": show_survey(view.topology, policy.housekeeping, findings)}


def show_survey(topology: Topology, housekeeping: CpuSet, findings: Sequence[object] = ()) -> dict[str, Any]:
    """Omits the kernel's command line: it may contain passwords."""
    plain: dict[str, Any] = to_plain(topology)
    del plain["cmdline"], plain["volume_group"], plain["caches"]
    return {**plain, "housekeeping": str(housekeeping), "findings": to_plain(tuple(findings))}
