"""Events as they happen, for any number of watchers (server-sent events, https://html.spec.whatwg.org/#server-sent-events)."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from orchestrator.api.workers import Workers
from orchestrator.errors import OrchestratorError
from orchestrator.ledger import Event
from orchestrator.model.access import Identity
from orchestrator.model.plain import to_plain

_log = logging.getLogger(__name__)

_HEARTBEAT = 15.0
_BATCH = 200
# Bytes after which a write begins.
_PIECE = 32 << 10
# How long one waiting takes: so long does the thread outlive the last watcher.
_WAIT = 10.0
# Between two wakings: each makes every watcher read the ledger.
_PAUSE = 0.05


class EventStream:
    """Streams of events. However many watch, one thread waits for the next event; without watchers there is none.

    Args:
        last_event: the id of the newest event.
        wait: waits a number of seconds for events after an id.
        read: reads up to a number of them after an id, as the caller may see them.
        workers: for reading them.
        heartbeat: seconds of silence after which a comment is sent, so that both sides notice a dead connection.
    """

    def __init__(
        self,
        last_event: Callable[[], int],
        wait: Callable[[int, float], Sequence[Event]],
        read: Callable[[Identity, int | None, int], Sequence[Event]],
        workers: Workers,
        heartbeat: float = _HEARTBEAT,
    ) -> None:
        self._last_event, self._wait, self._read = last_event, wait, read
        self._workers, self.heartbeat = workers, heartbeat
        self._changed = asyncio.Event()
        self.watchers = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def close(self) -> None:
        """Ends all streams, after what they are sending."""
        self._closed = True
        self._wake()

    async def follow(self, caller: Identity, after: int | None) -> AsyncIterator[bytes]:
        """Events that somebody may see, as they happen, in the format of text/event-stream.

        Args:
            after: id of the event after which to begin; None for those from now on.
        """
        self.watchers += 1
        try:
            newest = await self._workers.run(self._last_event)
            self._start(newest)
            seen = newest if after is None else after
            yield b": events follow\n\n"
            while not self._closed:
                changed = self._changed  # before reading: what comes in between is not missed
                pieces, seen = await self._workers.run(self._read_pieces, caller, seen)
                for piece in pieces:
                    yield piece
                if not pieces and not await _within(changed, self.heartbeat):
                    yield b": still here\n\n"
        except OrchestratorError as error:
            _log.error("a stream of events ends: %s", error)
        finally:
            self.watchers -= 1

    def _read_pieces(self, caller: Identity, seen: int) -> tuple[list[bytes], int]:
        """What is to be sent next, and the id up to which that goes. In few writes: each is work of the event loop, and with one
        for each event the streams of one client would keep it from all others.
        """
        events = self._read(caller, seen, _BATCH)
        pieces = [bytearray()] if events else []
        for event in events:
            if len(pieces[-1]) >= _PIECE:
                pieces.append(bytearray())
            pieces[-1] += format_event(event)
        return list(map(bytes, pieces)), events[-1].id if events else seen

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _start(self, newest: int) -> None:
        if self._thread is None:
            arguments = (newest, asyncio.get_running_loop())
            # A daemon, so that ending need not wait for it.
            self._thread = threading.Thread(target=self._watch, args=arguments, name="events", daemon=True)
            self._thread.start()

    def _watch(self, seen: int, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self.watchers and not self._closed:
                try:
                    events = self._wait(seen, _WAIT)
                except OrchestratorError as error:
                    _log.error("waiting for events: %s", error)
                    events = ()
                    time.sleep(1)
                if events:
                    seen = events[-1].id
                    loop.call_soon_threadsafe(self._wake)
                    time.sleep(_PAUSE)
            # In the loop's thread, where watchers come and go: one that has just come starts another.
            loop.call_soon_threadsafe(self._ended, seen)
        except RuntimeError:
            pass  # the loop has ended, and all watchers with it

    def _ended(self, seen: int) -> None:
        self._thread = None
        if self.watchers and not self._closed:
            self._start(seen)


def format_event(event: Event) -> bytes:
    """One event on the wire. Its data is JSON on one line."""
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(to_plain(event))}\n\n".encode()


async def _within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
