"""Endpoints of the guests' serial consoles."""

from __future__ import annotations

import base64
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from orchestrator.api.backend import Served
from orchestrator.api.callers import Caller, Writer
from orchestrator.api.fields import Boolean, Integer
from orchestrator.api.limits import Kind
from orchestrator.api.parameters import Header, Query
from orchestrator.api.routes.guests import Name
from orchestrator.api.routing import HOST_CODES, Routes
from orchestrator.api.waits import FOREVER, may_last
from orchestrator.client import shapes
from orchestrator.guests.console_stream import parse_position

_STREAM = "text/event-stream"
MAX_INPUT = 4096
"""Bytes of one input: as many as a pty holds."""

Lines = Annotated[Integer, Query(ge=0, le=100_000, description="Lines of earlier output; at most 1 MB is sent.")]
Follow = Annotated[Boolean, Query(description="false: end with the output so far.")]
LastPosition = Annotated[str | None, Header(alias="Last-Event-ID", max_length=128)]

routes = Routes()


def _check_uuid(text: str) -> str:
    try:
        if str(UUID(text)) == text:
            return text
    except ValueError:
        pass
    raise ValueError("not an id as in the parts of the console, such as 6f1c64e2-6a4a-5d3c-9f5d-0c3f6f1f3a55")


def _check_base64(text: str) -> str:
    try:
        size = len(base64.b64decode(text, validate=True))
    except ValueError:
        raise ValueError("not Base64 (RFC 4648 4)") from None
    if size > MAX_INPUT:
        raise ValueError(f"{size} bytes; the maximum is {MAX_INPUT}")
    return text


class ConsoleInput(BaseModel):
    """Bytes for the console of the guest with this id, in Base64."""

    model_config = ConfigDict(strict=True, extra="forbid")

    uuid: Annotated[str, Field(max_length=36), AfterValidator(_check_uuid)]
    data: Annotated[str, Field(min_length=4, max_length=(MAX_INPUT + 2) // 3 * 4), AfterValidator(_check_base64)]


@routes.add("GET", "/v1/guests/{name}/console", str, ("not-found", "guest", *HOST_CODES), media=_STREAM, kind=Kind.WAIT)
async def read_console(
    backend: Served, request: Request, caller: Caller, name: Name, lines: Lines = 0, *, follow: Follow = True,
    last_event_id: LastPosition = None,
) -> Response:  # fmt: skip
    after = parse_position(last_event_id) if last_event_id else None
    if request.state.head:
        # The stream would not end. The caller still learns whether the guest exists.
        await backend.quick.run(caller, backend.guests.guest, caller, name)
        return Response(media_type=_STREAM)
    may_last(request, FOREVER)
    stream = await backend.quick.run(
        caller, lambda: backend.guests.begin_reading(caller, name, lines, follow=follow, after=after)
    )
    return StreamingResponse(backend.consoles.follow(stream, caller), media_type=_STREAM)


@routes.add("POST", "/v1/guests/{name}/console", shapes.ConsoleTyped, ("cross-site", "not-found", "guest", *HOST_CODES))
async def type_console(backend: Served, caller: Writer, name: Name, body: ConsoleInput) -> Response:
    data = base64.b64decode(body.data)
    taken = await backend.quick.run(caller, backend.guests.type_console, caller, name, UUID(body.uuid), data)
    return JSONResponse({"taken": taken})
