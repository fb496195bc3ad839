"""The manager's HTTP interface: what can be asked, and how answers and errors look. No decision is made here."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from orchestrator import __version__
from orchestrator.api.error_answers import add_error_handlers
from orchestrator.api.fast import Body, Depends, FastAPI, Header, Path, Query, Request
from orchestrator.api.feed import Feed
from orchestrator.api.fields import Boolean, IfMatch, Integer, Number, refuse_more
from orchestrator.api.guard import Guard, HeadAsGet
from orchestrator.api.identity import Directory
from orchestrator.api.manager import Manager, View, quarantined_json, show_events
from orchestrator.api.openapi import build_document
from orchestrator.api.waits import FOREVER, Kinds, may_last, while_there
from orchestrator.api.work import Workers, WorkersOfEach
from orchestrator.client import shapes
from orchestrator.config import LimitConfig
from orchestrator.errors import Forbidden, NotFound, RequestError, Stale
from orchestrator.model.access import Identity, Role
from orchestrator.model.proof import Proof
from orchestrator.model.request import GuestRequest, as_value_error
from orchestrator.model.topology import Topology
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size, parse_guest_name

_HOUR = 3600
# Seconds that the end of a guest and its start take at most, beside its own time: pages that come back, a NIC's reset.
_CLEANING, _STARTING = 30.0, 120.0
_MAX_ID = (1 << 63) - 1
_STREAM = "text/event-stream"

Timeout = Annotated[float, Field(gt=0, le=_HOUR)]
Name = Annotated[
    str,
    AfterValidator(lambda text: as_value_error(lambda: parse_guest_name(text))),
    Path(description="The guest's name.", json_schema_extra={"pattern": "^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"}),
]
EventId = Annotated[Integer | None, Query(ge=0, le=_MAX_ID, description="Only events with ids above this one.")]
Force = Annotated[Boolean, Query(description="Give it free even if it is still not clean: the operator has seen to it.")]
WaitQuery = Annotated[Number, Query(gt=0, le=_HOUR, description="Seconds.")]


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

        def read_events(who: Identity, after: int | None, limit: int) -> list[shapes.Event]:
            return show_events(manager.events(who, after, limit), who, directory)

        self._read_events = read_events
        # Reads of which each may be long: few at a time, since they keep the interpreter and memory from others.
        self._long = WorkersOfEach(4)
        self.feed = Feed(manager, read_events, Workers(4))
        app = FastAPI(
            title="NoHype system manager", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
            openapi_url=None, generate_unique_id_function=lambda route: route.name,
            dependencies=[Depends(refuse_more)],
        )  # fmt: skip
        app.openapi = lambda: build_document(app)  # type: ignore[method-assign]
        app.add_middleware(HeadAsGet)
        add_error_handlers(app)
        self._add_host_routes(app, manager, audit, metrics)
        self._add_guest_routes(app, manager)
        self._add_change_routes(app, manager)
        self._add_event_routes(app)
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

        @app.get("/v1/openapi.json", include_in_schema=False)
        async def openapi(who: Who) -> Response:
            return await _encode_apart(self._long, who, app.openapi)

        @app.get("/v1/survey")
        async def survey(who: Reader) -> Response:
            def read() -> dict[str, Any]:
                topology = manager.survey()
                return {**survey_json(topology), "findings": _plain(manager.compare(topology))}

            return await _encode_apart(self._long, who, read)

        @app.get("/v1/audit")
        async def proofs(request: Request, who: Reader, frames: Annotated[Integer, Query(ge=0, le=10_000)] = 0) -> Response:
            if frames and who.role is not Role.OPERATOR:
                raise Forbidden(f"{who.name} may not make guests send frames", "leave out frames")
            measured = _encode_apart(self._audits, who, lambda: [proof.to_json() for proof in audit(frames)])
            return await while_there(request.receive, measured)

        @app.get("/v1/metrics")
        async def read_metrics(who: Reader) -> Response:
            if metrics is None:
                raise NotFound("this manager has no metrics")
            page, kind = await self._quick.run(who, metrics)
            return Response(page, media_type=kind)

        @app.get("/v1/quarantine")
        async def quarantined(who: Reader) -> Response:
            return await _encode_apart(self._quick, who, lambda: [quarantined_json(one) for one in manager.quarantined(who)])

    def _add_guest_routes(self, app: FastAPI, manager: Manager) -> None:
        @app.get("/v1/guests")
        async def guests(who: Who) -> Response:
            return await _encode_apart(self._quick, who, lambda: [guest.to_json() for guest in manager.guests(who)])

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

        @app.delete("/v1/quarantine/{name}", status_code=204)
        async def clear_quarantine(who: Operator, name: Name, *, force: Force = False, if_match: IfMatch = None) -> Response:
            version = await expected(who, name, if_match)
            await self._changes.run(who, functools.partial(manager.clear_quarantine, who, name, version, force=force))
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

    def _add_event_routes(self, app: FastAPI) -> None:
        @app.get("/v1/events")
        async def events(who: Who, after: EventId = None, limit: Annotated[Integer, Query(ge=1, le=1000)] = 1000) -> Response:
            return await _encode_apart(self._long, who, lambda: self._read_events(who, after, limit))

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


async def _encode_apart(workers: WorkersOfEach, who: Identity, read: Callable[[], Any]) -> Response:
    """What is read, as JSON. It is encoded in the worker's thread too: with thousands of entries the event loop would serve no
    one else meanwhile."""
    content = await workers.run(who, lambda: json.dumps(read(), separators=(",", ":")).encode())
    return Response(content, media_type="application/json")


def _show(view: View, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(view.to_json(), status, {"ETag": f'"{view.version}"', **(headers or {})})
