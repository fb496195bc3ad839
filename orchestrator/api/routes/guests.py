"""Endpoints of guests: lists, plans and changes."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator.api.backend import Backend, Served, answer_plain
from orchestrator.api.callers import Caller, Writer
from orchestrator.api.fields import IfMatch, Number
from orchestrator.api.limits import Kind
from orchestrator.api.parameters import Body, Path, Query
from orchestrator.api.routing import CHANGE_CODES, HOST_CODES, PLAN_CODES, Routes
from orchestrator.api.waits import may_last, while_connected
from orchestrator.client import shapes
from orchestrator.model.configuration import choose_hostname, choose_initiator
from orchestrator.model.exit_policy import ExitBudgets
from orchestrator.model.fields import NameField
from orchestrator.model.guest_view import GuestView
from orchestrator.model.plain import to_plain
from orchestrator.model.request import GuestRequest
from orchestrator.model.secret import Secret
from orchestrator.values import NAME, CpuSet

_HOUR = 3600
# Seconds that cleanup (huge pages returned, NIC reset) and launch take at most, in addition to the guest's own timeout.
_CLEANING, _STARTING = 30.0, 120.0

Timeout = Annotated[float, Field(gt=0, le=_HOUR)]
Name = Annotated[
    NameField,
    Path(description="The guest's name.", json_schema_extra={"pattern": f"^{NAME}$"}),
]
WaitQuery = Annotated[Number, Query(gt=0, le=_HOUR, description="Seconds.")]

routes = Routes()


class Tell(BaseModel):
    """A line for a guest's console, and how many seconds to wait for the reply."""

    model_config = ConfigDict(strict=True, extra="forbid")

    line: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[\x20-\x7e]+$")]
    timeout: Timeout = 60.0


class Stop(BaseModel):
    """How many seconds the guest has to power off before it is forced off."""

    model_config = ConfigDict(strict=True, extra="forbid")

    timeout: Timeout = 60.0


_DEFAULT_STOP = Stop()
StopBody = Annotated[Stop, Body()]


@routes.add("GET", "/v1/guests", list[shapes.Guest], HOST_CODES)
async def guests(backend: Served, caller: Caller) -> Response:
    def read() -> list[shapes.Guest]:
        housekeeping = backend.guests.host_setup.housekeeping
        return [show_guest(view, housekeeping) for view in backend.guests.guests(caller)]

    return await answer_plain(backend.quick, caller, read)


@routes.add("POST", "/v1/guests", shapes.Guest, ("guest", *PLAN_CODES), status=201, etag=True, repeatable=True)
async def create(backend: Served, caller: Writer, request: GuestRequest) -> Response:
    view, new = await backend.changes.run(caller, backend.guests.create, caller, request)
    return answer_guest(backend, view, 201 if new else 200, {"Location": f"/v1/guests/{request.name}"})


@routes.add("POST", "/v1/plans", shapes.Guest, PLAN_CODES)
async def plan(backend: Served, caller: Caller, request: GuestRequest) -> Response:
    view = await backend.quick.run(caller, backend.guests.plan, caller, request)
    return JSONResponse(show_guest(view, backend.guests.host_setup.housekeeping))


@routes.add("GET", "/v1/guests/{name}", shapes.Guest, ("not-found", *HOST_CODES), etag=True)
async def guest(backend: Served, caller: Caller, name: Name) -> Response:
    return answer_guest(backend, await backend.quick.run(caller, backend.guests.guest, caller, name))


@routes.add(
    "GET",
    "/v1/guests/{name}/ready",
    shapes.Ready,
    ("not-found", "guest", "ready-by-ssh", "conflict", *HOST_CODES),
    kind=Kind.WAIT,
)
async def ready(backend: Served, request: Request, caller: Caller, name: Name, timeout: WaitQuery = 60.0) -> Response:
    may_last(request, timeout)
    wait = await backend.quick.run(caller, backend.guests.begin_ready, caller, name, timeout)
    return JSONResponse({"line": await while_connected(request.receive, wait)})


@routes.add(
    "POST", "/v1/guests/{name}/tell", shapes.Answer, ("cross-site", "not-found", "guest", "conflict", *HOST_CODES), kind=Kind.WAIT
)
async def tell(backend: Served, request: Request, caller: Writer, name: Name, body: Tell) -> Response:
    may_last(request, body.timeout)
    wait = await backend.quick.run(caller, backend.guests.begin_command, caller, name, body.line, body.timeout)
    return JSONResponse({"answer": await while_connected(request.receive, wait)})


@routes.add("DELETE", "/v1/guests/{name}", None, CHANGE_CODES, status=204, kind=Kind.END)
async def delete(backend: Served, caller: Writer, name: Name, if_match: IfMatch = None) -> Response:
    version = await backend.choose_version(caller, name, if_match)
    await backend.ends.run(caller, backend.guests.delete, caller, name, version)
    return Response(status_code=204)


@routes.add("POST", "/v1/guests/{name}/start", shapes.Guest, CHANGE_CODES, etag=True)
async def start(backend: Served, caller: Writer, name: Name, if_match: IfMatch = None) -> Response:
    version = await backend.choose_version(caller, name, if_match)
    return answer_guest(backend, await backend.changes.run(caller, backend.guests.start, caller, name, version))


@routes.add("POST", "/v1/guests/{name}/kill", shapes.Guest, CHANGE_CODES, etag=True, kind=Kind.END)
async def kill(backend: Served, caller: Writer, name: Name, if_match: IfMatch = None) -> Response:
    version = await backend.choose_version(caller, name, if_match)
    return answer_guest(backend, await backend.ends.run(caller, backend.guests.kill, caller, name, version))


@routes.add("POST", "/v1/guests/{name}/stop", shapes.Guest, CHANGE_CODES, etag=True)
async def stop(
    backend: Served, request: Request, caller: Writer, name: Name, body: StopBody = _DEFAULT_STOP, if_match: IfMatch = None
) -> Response:
    may_last(request, body.timeout + _CLEANING)
    version = await backend.choose_version(caller, name, if_match)
    return answer_guest(backend, await backend.changes.run(caller, backend.guests.stop, caller, name, body.timeout, version))


@routes.add("POST", "/v1/guests/{name}/restart", shapes.Guest, CHANGE_CODES, etag=True)
async def restart(
    backend: Served, request: Request, caller: Writer, name: Name, body: StopBody = _DEFAULT_STOP, if_match: IfMatch = None
) -> Response:
    may_last(request, body.timeout + _CLEANING + _STARTING)
    version = await backend.choose_version(caller, name, if_match)
    return answer_guest(backend, await backend.changes.run(caller, backend.guests.restart, caller, name, body.timeout, version))


def show_guest(view: GuestView, housekeeping: CpuSet) -> shapes.Guest:
    """Sizes are in bytes."""
    plan, request = view.plan, view.request
    return {
        "name": plan.name, "state": view.state, "owner": view.owner, "version": view.version, "restarts": view.restarts,
        "created": view.created or None, "creator": view.creator or None,
        "cores": to_plain(plan.cores), "cpus": list(plan.cpus), "node": plan.node,
        "memory": plan.memory.bytes, "huge_pages": plan.pages, "page_size": plan.page_size.bytes,
        "housekeeping": str(housekeeping), "vf": to_plain(plan.vf.vf) if plan.nics else None, "nics": to_plain(plan.nics),
        "disks": to_plain(plan.disks), "waived": to_plain(plan.waived), "caches": to_plain(plan.caches),
        "progress": to_plain(view.progress),
        "image": plan.image.name, "cmdline": plan.cmdline,
        "cpu_features": list(plan.cpu_features), "restart": to_plain(request.restart), "id": request.id,
        "hostname": choose_hostname(request), "ssh_keys": len(request.ssh_keys), "user_data": _show(request.user_data),
        "network_config": _show(request.network_config),
        "warnings": list(view.warnings), "addresses": [nic.address for nic in request.wanted_nics if nic.address],
        "ssh_host_key": view.host_key or None, "initiator": choose_initiator(plan, request),
        "disengaged": {"time": end.time, "signal": end.signal.value} if (end := view.disengaged) else None,
        "exit_policy": _show_policy(request.exit_policy),
        "housekeeping_vcpus": request.housekeeping,
    }  # fmt: skip


def _show_policy(policy: ExitBudgets | None) -> shapes.ExitPolicy | None:
    return cast("shapes.ExitPolicy", policy.model_dump(mode="json")) if policy else None


def _show(secret: Secret | None) -> str | None:
    return secret.short_hash if secret else None


def answer_guest(backend: Backend, view: GuestView, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(
        show_guest(view, backend.guests.host_setup.housekeeping), status, {"ETag": f'"{view.version}"', **(headers or {})}
    )
