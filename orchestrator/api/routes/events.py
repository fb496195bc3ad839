"""Endpoints of the event log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from orchestrator.api.backend import Served, answer_plain
from orchestrator.api.callers import Caller
from orchestrator.api.fields import Integer
from orchestrator.api.identity import IdentityMap, acts_for
from orchestrator.api.limits import Kind
from orchestrator.api.parameters import Header, Query
from orchestrator.api.routing import HOST_CODES, Routes
from orchestrator.api.waits import FOREVER, may_last
from orchestrator.client import shapes
from orchestrator.errors import RequestError
from orchestrator.ledger import Event
from orchestrator.model.access import MANAGER, Identity, Role

_MAX_ID = (1 << 63) - 1
_STREAM = "text/event-stream"

EventId = Annotated[Integer | None, Query(ge=0, le=_MAX_ID, description="Only events with ids above this one.")]
Limit = Annotated[Integer, Query(ge=1, le=1000)]
LastEventId = Annotated[str | None, Header(max_length=20)]

routes = Routes()


@routes.add("GET", "/v1/events", list[shapes.Event], HOST_CODES)
async def events(backend: Served, caller: Caller, after: EventId = None, limit: Limit = 1000) -> Response:
    return await answer_plain(backend.long, caller, lambda: backend.read_events(caller, after, limit))


@routes.add("GET", "/v1/events/stream", str, HOST_CODES, media=_STREAM, kind=Kind.WAIT)
async def stream_events(
    backend: Served, request: Request, caller: Caller, after: EventId = None, last_event_id: LastEventId = None
) -> Response:
    if last_event_id:
        if not re.fullmatch(r"[0-9]{1,18}", last_event_id):
            raise RequestError(f"invalid Last-Event-ID {last_event_id!r}", "send the id of an event")
        after = int(last_event_id)
    if request.state.head:
        # The stream would never end.
        return Response(media_type=_STREAM)
    may_last(request, FOREVER)
    return StreamingResponse(backend.stream.follow(caller, after), media_type=_STREAM)


def show_events(events: Sequence[Event], caller: Identity, identities: IdentityMap) -> tuple[Event, ...]:
    """Replaces names that a tenant must not see: of callers outside the tenant it reads "operator"."""
    if caller.role is not Role.TENANT:
        return tuple(events)
    known = {MANAGER.name: True, caller.name: True}
    for event in events:
        if event.who not in known:
            known[event.who] = acts_for(identities, event.who, caller.tenant)
    return tuple(event if known[event.who] else replace(event, who=str(Role.OPERATOR)) for event in events)
