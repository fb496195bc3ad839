"""The manager's HTTP interface: what can be asked, and how answers and errors look. No decision is made here."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from orchestrator import __version__
from orchestrator.access import Identity, Role
from orchestrator.api.body import ClientGone
from orchestrator.api.fast import Body, Depends, FastAPI, Header, Path, Query, Request, RequestValidationError
from orchestrator.api.feed import Feed
from orchestrator.api.fields import IfMatch, refuse_more
from orchestrator.api.guard import Guard, HeadAsGet
from orchestrator.api.identity import Directory
from orchestrator.api.manager import Manager, View, event_json, quarantined_json
from orchestrator.api.openapi import build_document
from orchestrator.api.problems import MEDIA_TYPE, InternalError, WrongMethod, build_headers, build_problem
from orchestrator.api.waits import FOREVER, Kinds, answer_nobody, may_last, while_there
from orchestrator.api.work import Workers, WorkersOfEach
from orchestrator.config import LimitConfig
from orchestrator.errors import Forbidden, NotFound, OrchestratorError, RequestError, Stale
from orchestrator.proof import Proof
from orchestrator.request import GuestRequest, as_value_error, describe
from orchestrator.topology import Topology
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size, parse_guest_name

_log = logging.getLogger(__name__)

_HOUR = 3600
# Seconds that the end of a guest and its start take at most, beside its own time: pages that come back, a NIC's reset.
_CLEANING, _STARTING = 30.0, 120.0
_MAX_ID = (1 << 63) - 1
_LONGEST_DETAIL = 2000
_STREAM = "text/event-stream"

Timeout = Annotated[float, Field(gt=0, le=_HOUR)]
Name = Annotated[
    str,
    AfterValidator(lambda text: as_value_error(lambda: parse_guest_name(text))),
    Path(description="The guest's name.", json_schema_extra={"pattern": "^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"}),
]
EventId = Annotated[int | None, Query(ge=0, le=_MAX_ID, description="Only events with ids above this one.")]
Force = Annotated[bool, Query(description="Give it free even if it is still not clean: the operator has seen to it.")]
WaitQuery = Annotated[float, Query(gt=0, le=_HOUR, description="Seconds.")]


class Tell(BaseModel):
    """A line for a guest's console, and how many seconds to wait for the answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    line: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[\x20-\x7e]+$")]
    timeout: Timeout = 60.0


class Stop(BaseModel):
    """How many seconds the guest has to shut down by itself, before it is ended the hard way."""

    model_config = ConfigDict(strict=True, extra="forbid")

    timeout: Timeout = 60.0


_IN_GOOD_TIME = Stop()


async def _who(request: Request) -> Identity:
    who: Identity = request.state.who
    return who


async def _reader(request: Request) -> Identity:
    """Whoever may see the whole host."""
    who = await _who(request)
    if who.role is Role.TENANT:
        raise Forbidden(f"{who.name} acts for the tenant {who.tenant} and sees its guests only", "ask the operator of the host")
    return who


async def _changer(request: Request) -> Identity:
    """Whoever may change something; what exactly, the manager decides."""
    who = await _who(request)
    if who.role is Role.VIEWER:
        raise Forbidden(f"{who.name} is a viewer, who changes nothing", "ask the operator of the host")
    return who


async def _operator(request: Request) -> Identity:
    who = await _who(request)
    if who.role is not Role.OPERATOR:
        raise Forbidden(f"{who.name} is no operator", "ask the operator of the host")
    return who


Who = Annotated[Identity, Depends(_who)]
Reader = Annotated[Identity, Depends(_reader)]
Changer = Annotated[Identity, Depends(_changer)]
Operator = Annotated[Identity, Depends(_operator)]


class Api:
    """The application, and what of it must be ended.

    Args:
        manager: does the work.
        audit: measures all proofs; takes the number of frames to send from guest to guest, 0 for none.
        directory: who is who.
        limits: how much one client may ask for.
        metrics: the page that Prometheus reads, and its content type; None if there is none.
    """

    def __init__(
        self,
        manager: Manager,
        audit: Callable[[int], Iterable[Proof]],
        directory: Directory,
        limits: LimitConfig | None = None,
        metrics: Callable[[], tuple[bytes, str]] | None = None,
    ) -> None:
        # Apart, so that a look at the guests never waits for a guest that takes its time, nor does what ends such a guest. What
        # waits on a console takes no thread.
        self._quick, self._changes, self._ends = WorkersOfEach(32), WorkersOfEach(64), WorkersOfEach(64)
        self._audits = WorkersOfEach(2)
        self.feed = Feed(manager, Workers(32))
        app = FastAPI(
            title="NoHype system manager", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
            openapi_url="/v1/openapi.json", generate_unique_id_function=lambda route: route.name,
            dependencies=[Depends(refuse_more)],
        )  # fmt: skip
        app.openapi = lambda: build_document(app)  # type: ignore[method-assign]
        app.add_middleware(HeadAsGet)
        app.add_exception_handler(OrchestratorError, _answer_error)
        app.add_exception_handler(RequestValidationError, _answer_invalid)
        app.add_exception_handler(HTTPException, _answer_http)
        app.add_exception_handler(Exception, _answer_fault)
        app.add_exception_handler(ClientGone, answer_nobody)
        self._add_host_routes(app, manager, audit, metrics)
        self._add_guest_routes(app, manager)
        self._add_change_routes(app, manager)
        self._add_event_routes(app, manager)
        self.app = Guard(app, directory, limits or LimitConfig(), Kinds(app.routes))

    def _add_host_routes(
        self,
        app: FastAPI,
        manager: Manager,
        audit: Callable[[int], Iterable[Proof]],
        metrics: Callable[[], tuple[bytes, str]] | None,
    ) -> None:
        @app.get("/v1/version")
        async def version(_who: Who) -> Response:
            return JSONResponse({"version": __version__})

        @app.get("/v1/survey")
        async def survey(who: Reader) -> Response:
            topology = await self._quick.run(who, manager.survey)
            findings = _plain(await self._quick.run(who, manager.compare, topology))
            return JSONResponse({**survey_json(topology), "findings": findings})

        @app.get("/v1/audit")
        async def proofs(request: Request, who: Reader, frames: Annotated[int, Query(ge=0, le=10_000)] = 0) -> Response:
            if frames and who.role is not Role.OPERATOR:
                raise Forbidden(f"{who.name} may not make guests send frames", "leave out frames")
            measured = await while_there(request.receive, self._audits.run(who, audit, frames))
            return JSONResponse([proof.to_json() for proof in measured])

        @app.get("/v1/metrics")
        async def read_metrics(who: Reader) -> Response:
            if metrics is None:
                raise NotFound("this manager has no metrics")
            page, kind = await self._quick.run(who, metrics)
            return Response(page, media_type=kind)

        @app.get("/v1/quarantine")
        async def quarantined(who: Reader) -> Response:
            return JSONResponse([quarantined_json(one) for one in await self._quick.run(who, manager.quarantined, who)])

        @app.delete("/v1/quarantine/{name}", status_code=204)
        async def clear_quarantine(who: Operator, name: Name, *, force: Force = False) -> Response:
            await self._changes.run(who, functools.partial(manager.clear_quarantine, who, name, force=force))
            return Response(status_code=204)

    def _add_guest_routes(self, app: FastAPI, manager: Manager) -> None:
        @app.get("/v1/guests")
        async def guests(who: Who) -> Response:
            return JSONResponse([guest.to_json() for guest in await self._quick.run(who, manager.guests, who)])

        @app.post("/v1/guests", status_code=201)
        async def create(who: Changer, request: GuestRequest) -> Response:
            view, new = await self._changes.run(who, manager.create, who, request)
            return _show(view, 201 if new else 200, {"Location": f"/v1/guests/{request.name}"})

        @app.post("/v1/plans")
        async def plan(who: Who, request: GuestRequest) -> Response:
            return JSONResponse((await self._quick.run(who, manager.plan, who, request)).to_json())

        @app.get("/v1/guests/{name}")
        async def guest(who: Who, name: Name) -> Response:
            return _show(await self._quick.run(who, manager.guest, who, name))

        @app.get("/v1/guests/{name}/ready")
        async def ready(request: Request, who: Who, name: Name, timeout: WaitQuery = 60.0) -> Response:
            may_last(request, timeout)
            wait = await self._quick.run(who, manager.begin_ready, who, name, timeout)
            return JSONResponse({"line": await while_there(request.receive, wait)})

        @app.post("/v1/guests/{name}/tell")
        async def tell(request: Request, who: Changer, name: Name, body: Tell) -> Response:
            may_last(request, body.timeout)
            wait = await self._quick.run(who, manager.begin_tell, who, name, body.line, body.timeout)
            return JSONResponse({"answer": await while_there(request.receive, wait)})

    def _add_change_routes(self, app: FastAPI, manager: Manager) -> None:
        async def expected(who: Identity, name: str, versions: frozenset[int] | None) -> int | None:
            """The version that the caller has seen; of several that of the guest as it is now, if it is among them."""
            if versions is None or len(versions) == 1:
                return next(iter(versions)) if versions else None
            current = (await self._quick.run(who, manager.guest, who, name)).version
            if current not in versions:
                raise Stale(f"guest {name} is version {current}, which If-Match does not name", "look at it again")
            return current

        @app.delete("/v1/guests/{name}", status_code=204)
        async def delete(who: Changer, name: Name, if_match: IfMatch = None) -> Response:
            await self._ends.run(who, manager.delete, who, name, await expected(who, name, if_match))
            return Response(status_code=204)

        @app.post("/v1/guests/{name}/start")
        async def start(who: Changer, name: Name, if_match: IfMatch = None) -> Response:
            return _show(await self._changes.run(who, manager.start, who, name, await expected(who, name, if_match)))

        @app.post("/v1/guests/{name}/kill")
        async def kill(who: Changer, name: Name, if_match: IfMatch = None) -> Response:
            return _show(await self._ends.run(who, manager.kill, who, name, await expected(who, name, if_match)))

        @app.post("/v1/guests/{name}/stop")
        async def stop(
            request: Request, who: Changer, name: Name, body: Annotated[Stop, Body()] = _IN_GOOD_TIME, if_match: IfMatch = None
        ) -> Response:
            may_last(request, body.timeout + _CLEANING)
            version = await expected(who, name, if_match)
            return _show(await self._changes.run(who, manager.stop, who, name, body.timeout, version))

        @app.post("/v1/guests/{name}/restart")
        async def restart(
            request: Request, who: Changer, name: Name, body: Annotated[Stop, Body()] = _IN_GOOD_TIME, if_match: IfMatch = None
        ) -> Response:
            may_last(request, body.timeout + _CLEANING + _STARTING)
            version = await expected(who, name, if_match)
            return _show(await self._changes.run(who, manager.restart, who, name, body.timeout, version))

    def _add_event_routes(self, app: FastAPI, manager: Manager) -> None:
        @app.get("/v1/events")
        async def events(who: Who, after: EventId = None, limit: Annotated[int, Query(ge=1, le=1000)] = 1000) -> Response:
            return JSONResponse([event_json(event) for event in await self._quick.run(who, manager.events, who, after, limit)])

        @app.get("/v1/events/stream")
        async def stream_events(
            request: Request, who: Who, after: EventId = None, last_event_id: Annotated[str | None, Header(max_length=20)] = None
        ) -> Response:
            if last_event_id:
                if not re.fullmatch(r"[0-9]{1,18}", last_event_id):
                    raise RequestError(f"Last-Event-ID {last_event_id!r} is no id of an event")
                after = int(last_event_id)
            if request.state.head:
                # Nobody reads the stream, which has no end.
                return Response(media_type=_STREAM)
            may_last(request, FOREVER)
            return StreamingResponse(self.feed.stream(who, after), media_type=_STREAM)


def survey_json(topology: Topology) -> dict[str, Any]:
    """A survey as plain JSON types: CPU sets as lists in the kernel's format, sizes in bytes."""
    plain: dict[str, Any] = _plain(topology)
    return {name: value for name, value in plain.items() if name != "cmdline"}  # it may have passwords in it


def _plain(value: Any) -> Any:
    if isinstance(value, CpuSet | MacAddress | PciAddress):
        return str(value)
    if isinstance(value, Size):
        return value.bytes
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _show(view: View, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(view.to_json(), status, {"ETag": f'"{view.version}"', **(headers or {})})


def _problem(error: OrchestratorError, headers: dict[str, str] | None = None) -> JSONResponse:
    problem = build_problem(error)
    return JSONResponse(problem, int(str(problem["status"])), {**build_headers(error), **(headers or {})}, MEDIA_TYPE)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OrchestratorError)
    answer = _problem(error)
    if answer.status_code >= 500:
        _log.error("%s %s: %s", request.method, request.url.path, error)
        if request.state.who.role is Role.TENANT:
            # What the kernel or libvirt said may name other guests.
            hidden = OrchestratorError("the host could not do this", "its operator's log says why")
            hidden.code = error.code
            return _problem(hidden)
    return answer


async def _answer_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Names of fields come from the client: what could move a terminal's cursor is shown as it would be written.
    said = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in describe(error)[:_LONGEST_DETAIL])
    return _problem(RequestError("the request is wrong: " + said))


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: a path that is not there, or that can't be asked this way."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        return _problem(NotFound(f"there is nothing at {path!r}", "GET /v1/openapi.json lists what there is"))
    if error.status_code == 405:
        methods = sorted(find_methods(request.app, request.scope["path"]))
        wrong = WrongMethod(f"{path} can't be asked with {request.method[:20]}", f"use {' or '.join(methods)}")
        return _problem(wrong, {"Allow": ", ".join(methods)})
    if error.status_code == 400:
        return _problem(RequestError(f"the request is wrong: {error.detail}"))
    _log.error("%s %s: %s", request.method, path, error.detail)
    return _problem(InternalError())


async def _answer_fault(_request: Request, _error: Exception) -> Response:
    """A fault of ours; the framework raises it again afterwards, and the guard logs it."""
    return _problem(InternalError())


def find_methods(app: FastAPI, path: str) -> frozenset[str]:
    """The methods with which a path can be asked; each is a route of its own, and the framework names those of the first only."""
    routes = [route for route in app.routes if (regex := getattr(route, "path_regex", None)) and regex.match(path)]
    methods = frozenset(method for route in routes for method in getattr(route, "methods", None) or ())
    return methods | {"HEAD"} if "GET" in methods else methods
