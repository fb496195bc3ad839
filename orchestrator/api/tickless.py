"""A uvicorn server that wakes up only for requests and to stop."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate

from orchestrator.api.uvicorn_import import Config, Server, ServerState
from orchestrator.errors import OrchestratorError


class TicklessServer(Server):
    """uvicorn's main loop wakes up ten times per second to check for a stop and read the time (uvicorn.Server.on_tick).

    Here stopping is an event, and each response reads the time. `limit_max_requests` and `callback_notify` have no effect.

    Args:
        ready: called once when requests are answered.
        stopping: called once when the server starts to stop; open requests are still answered.
    """

    def __init__(
        self, config: Config, ready: Callable[[], object] = lambda: None, stopping: Callable[[], object] = lambda: None
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._exit = False
        super().__init__(config)
        self.server_state = _PerResponseDate(config)
        self._ready, self._stopping = ready, stopping

    @property
    def should_exit(self) -> bool:
        """Can be set by any thread, and by a signal handler."""
        return self._exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._exit = value
        if value and self._loop is not None and self._end is not None and not self._loop.is_closed():
            # Wakes the loop through asyncio's own pipe: the only way that is safe from a thread or a signal handler.
            self._loop.call_soon_threadsafe(self._end.set)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        await super().startup(sockets)
        self.listen()
        self._ready()

    def listen(self) -> None:
        """Hook: serves listeners that uvicorn does not know."""

    async def main_loop(self) -> None:
        assert self._end is not None
        # should_exit may have been set before the event existed.
        if not self._exit:
            await self._end.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping()
        await super().shutdown(sockets)

    def check(self, timeout: float) -> None:
        """Raises OrchestratorError if the event loop is blocked for ``timeout`` seconds. Called by other threads."""
        if self._loop is None:
            return
        done = threading.Event()
        try:
            self._loop.call_soon_threadsafe(done.set)
        except RuntimeError:
            return  # the loop is closed
        if not done.wait(timeout) and not self._exit:
            raise OrchestratorError(f"the server's event loop has not responded for {timeout:g} s")


class _PerResponseDate(ServerState):
    """Computes the Date header per response (RFC 9110 6.6.1: a server with a clock sends Date)."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._second, self._date = 0, b""
        super().__init__()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        if (now := int(time.time())) != self._second:
            self._second, self._date = now, formatdate(now, usegmt=True).encode()
        date = [(b"date", self._date)] if self._config.date_header else []
        return [*date, *self._config.encoded_headers]

    @default_headers.setter
    def default_headers(self, _value: list[tuple[bytes, bytes]]) -> None:
        pass  # uvicorn sets it at its ticks
