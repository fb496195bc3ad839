"""Ends a wait when its client disconnects; finds which requests are waits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Receive

from orchestrator.api.body import ClientDisconnected
from orchestrator.api.limits import Admission, Kind
from orchestrator.api.routing import Route

_Result = TypeVar("_Result")

FOREVER = float("inf")


class Kinds:
    """Finds the kind of a request from its method and path, before its body is read."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._known: list[tuple[str, re.Pattern[str], Kind]] = [
            (route.method, compile_path(route.path)[0], route.kind) for route in routes if route.kind is not Kind.OTHER
        ]

    def find(self, method: str, path: str) -> Kind:
        # HEAD counts as GET.
        method = "GET" if method == "HEAD" else method
        return next((kind for one, regex, kind in self._known if one == method and regex.match(path)), Kind.OTHER)


def may_last(request: Request, seconds: float) -> None:
    """Records how long the request can take; refused requests of the same client report it."""
    admission: Admission = request.state.admission
    admission.may_last(seconds)


async def while_connected(receive: Receive, wait: Awaitable[_Result] | Future[_Result]) -> _Result:
    """The result of ``wait``. If the client disconnects first, cancels the wait and raises ClientDisconnected.

    The body of the request must have been read.
    """
    answer = asyncio.wrap_future(wait) if isinstance(wait, Future) else asyncio.ensure_future(wait)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnected
        return answer.result()
    finally:
        for future in (answer, gone):
            future.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        # An error refers to this frame, and the future to the error: a cycle that would keep the connection and its buffers.
        del answer, wait


async def within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event is set before the time is over."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


async def ignore_disconnected(_request: Request, _error: Exception) -> Response:
    # The server drops a response to a closed connection.
    return Response(status_code=499)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
