"""Sends the output of guests' consoles to any number of readers, as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from orchestrator.api.error_answers import hide_details
from orchestrator.api.waits import within
from orchestrator.client import shapes
from orchestrator.client.problems import build_problem
from orchestrator.guests.console_stream import ConsoleStream, Part
from orchestrator.model.access import Identity

_HEARTBEAT = 15.0
_RATE = 512 << 10
"""Bytes per second and reader. A serial port is slower; many readers of a flooding guest must not occupy the event loop."""


class ConsoleFeed:
    """A reader that is slow holds up only itself: output is read for it when it has received what was sent.

    Args:
        heartbeat: seconds without output after which a comment is sent, so that both sides detect a dead connection.
    """

    def __init__(self, heartbeat: float = _HEARTBEAT) -> None:
        self._heartbeat = heartbeat
        self._wakes: set[Callable[[], object]] = set()
        self._closed = False

    @property
    def readers(self) -> int:
        return len(self._wakes)

    def close(self) -> None:
        """Ends all responses. Without a last part, so that the readers connect again."""
        self._closed = True
        for wake in self._wakes:
            wake()

    async def follow(self, stream: ConsoleStream, caller: Identity) -> AsyncIterator[bytes]:
        """Yields text/event-stream until the last part."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop has stopped
                loop.call_soon_threadsafe(changed.set)

        self._wakes.add(changed.set)
        # Without output, so that a reader of a silent guest knows its id.
        first = format_part(Part(stream.position, b""), caller)
        stream.notify = notify
        stream.start()
        try:
            yield first
            while not self._closed:
                changed.clear()
                if part := stream.take():
                    yield format_part(part, caller)
                    if part.is_last:
                        return
                    await asyncio.sleep(len(part.output) / _RATE)
                elif not await within(changed, self._heartbeat):
                    yield b": still here\n\n"
        finally:
            self._wakes.discard(changed.set)
            stream.cancel()


def format_part(part: Part, caller: Identity) -> bytes:
    shown: shapes.ConsolePart = {
        "uuid": str(part.position.uuid), "position": str(part.position), "output": base64.b64encode(part.output).decode(),
        "may_have_skipped": part.may_have_skipped, "last": part.is_last,
        "problem": dict(build_problem(hide_details(part.error, caller))) if part.error else None,
    }  # fmt: skip
    return f"id: {part.position}\nevent: console\ndata: {json.dumps(shown)}\n\n".encode()
