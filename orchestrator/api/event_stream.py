"""Streams events to any number of watchers (server-sent events, https://html.spec.whatwg.org/#server-sent-events)."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from orchestrator.api.waits import within
from orchestrator.api.workers import Workers
from orchestrator.errors import OrchestratorError
from orchestrator.ledger import Event
from orchestrator.model.access import Identity
from orchestrator.model.plain import to_plain

_log = logging.getLogger(__name__)

_HEARTBEAT = 15.0
_BATCH = 200
# Bytes of one write.
_PIECE = 32 << 10
# Seconds of one wait: the thread outlives the last watcher by this.
_WAIT = 10.0
# Seconds between wake-ups: each makes every watcher read the ledger.
_PAUSE = 0.05


class EventStream:
    """One thread waits for the next event for all watchers; without watchers it ends.

    Args:
        last_event: returns the id of the newest event.
        wait: waits for events after an id, for a number of seconds.
        read: returns the events after an id that the caller may see, up to a number.
        heartbeat: seconds without an event after which a comment is sent, so that both sides detect a dead connection.
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
        self._closed = True
        self._wake()

    async def follow(self, caller: Identity, after: int | None) -> AsyncIterator[bytes]:
        """Yields text/event-stream: the events after the id ``after`` (None: from now on) that the caller may see."""
        self.watchers += 1
        try:
            newest = await self._workers.run(self._last_event)
            self._start(newest)
            seen = newest if after is None else after
            yield b": events follow\n\n"
            while not self._closed:
                changed = self._changed  # before reading, so that events in between are not missed
                pieces, seen = await self._workers.run(self._read_pieces, caller, seen)
                for piece in pieces:
                    yield piece
                if not pieces and not await within(changed, self.heartbeat):
                    yield b": still here\n\n"
        except OrchestratorError as error:
            _log.error("stream of events ended: %s", error)
        finally:
            self.watchers -= 1

    def _read_pieces(self, caller: Identity, seen: int) -> tuple[list[bytes], int]:
        """The next writes and the id of their last event. Writes are large: one per event would occupy the event loop."""
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
            # A daemon, so that the process can exit without it.
            self._thread = threading.Thread(target=self._watch, args=arguments, name="events", daemon=True)
            self._thread.start()

    def _watch(self, seen: int, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self.watchers and not self._closed:
                try:
                    events = self._wait(seen, _WAIT)
                except OrchestratorError as error:
                    _log.error("cannot wait for events: %s", error)
                    events = ()
                    time.sleep(1)
                if events:
                    seen = events[-1].id
                    loop.call_soon_threadsafe(self._wake)
                    time.sleep(_PAUSE)
            # In the loop's thread, which counts watchers: a new one starts another thread.
            loop.call_soon_threadsafe(self._ended, seen)
        except RuntimeError:
            pass  # the loop has stopped, with all watchers

    def _ended(self, seen: int) -> None:
        self._thread = None
        if self.watchers and not self._closed:
            self._start(seen)


def format_event(event: Event) -> bytes:
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(to_plain(event))}\n\n".encode()
