"""Ends a wait when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request
from starlette.types import Receive

from orchestrator.api.body import ClientDisconnected
from orchestrator.api.limits import Admission

_Result = TypeVar("_Result")

FOREVER = float("inf")


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


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
