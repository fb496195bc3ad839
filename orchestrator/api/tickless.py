"""uvicorn without its clock: a server that wakes up only when somebody asks for something, or tells it to end."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from email.utils import formatdate

import uvicorn
from uvicorn.server import ServerState

from orchestrator.errors import OrchestratorError


class TicklessServer(uvicorn.Server):
    """uvicorn's main loop looks ten times a second whether it should end, and what time it is (uvicorn.Server.on_tick).

    Here ending is an event, and the date is asked for when an answer needs it. uvicorn's `limit_max_requests` and
    `callback_notify`, which hang on its clock, do nothing.

    Args:
        config: uvicorn's.
        ready: called once when requests are answered.
        stopping: called once when the server begins to end; open requests are still answered.
    """

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], object] = lambda: None, stopping: Callable[[], object] = lambda: None
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._exit = False
        super().__init__(config)
        self.server_state = _PerResponseDate(config)
        self._ready, self._stopping = ready, stopping

    @property
    def should_exit(self) -> bool:
        """Whether the server is to end. May be set by any thread, and by a signal's handler."""
        return self._exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._exit = value
        if value and self._loop is not None and self._end is not None and not self._loop.is_closed():
            # Wakes the loop up through a pipe of its own (asyncio): the one way that is safe from a thread or a signal's handler.
            self._loop.call_soon_threadsafe(self._end.set)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        await super().startup(sockets)
        self.listen()
        self._ready()

    def listen(self) -> None:
        """Begins to serve what uvicorn does not know of; may be overridden."""

    async def main_loop(self) -> None:
        """See uvicorn.Server: waits until the server is to end, and does nothing else."""
        assert self._end is not None
        # It may have been told to before there was an event.
        if not self._exit:
            await self._end.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        self._stopping()
        await super().shutdown(sockets)

    def check(self, timeout: float) -> None:
        """Looks, from another thread, whether the event loop does what it is asked; none that runs is fine.

        Raises:
            OrchestratorError: it did not within ``timeout`` seconds: something blocks it.
        """
        if self._loop is None:
            return
        done = threading.Event()
        try:
            self._loop.call_soon_threadsafe(done.set)
        except RuntimeError:
            return  # the loop is closed
        if not done.wait(timeout) and not self._exit:
            raise OrchestratorError(f"the server's event loop has not answered for {timeout:g} s")


class _PerResponseDate(ServerState):
    """Gives each answer the headers of its own moment (RFC 9110 6.6.1: a server with a clock sends Date)."""

    def __init__(self, config: uvicorn.Config) -> None:
        self._config = config
        super().__init__()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """What uvicorn puts before an answer's own headers."""
        date = [(b"date", formatdate(usegmt=True).encode())] if self._config.date_header else []
        return [*date, *self._config.encoded_headers]

    @default_headers.setter
    def default_headers(self, _value: list[tuple[bytes, bytes]]) -> None:
        """uvicorn sets it at its ticks; there are none."""
