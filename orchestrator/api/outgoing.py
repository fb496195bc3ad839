"""Delivers the whole response to a client that reads slowly, as long as it keeps a minimum rate."""

from __future__ import annotations

import asyncio
from typing import Any

# In each window of 30 s a client must read at least _PACE bytes, or all that is left.
WINDOW_SECONDS = 30.0
_PACE = 64 << 10
_POLL_INTERVAL = 0.05


class _Lost(asyncio.Transport):
    def is_closing(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def close(self) -> None:
        pass

    abort = pause_reading = resume_reading = close


_LOST = _Lost()


class Outgoing:
    """An asyncio.Transport whose ``close`` waits until the kernel has taken all that was written.

    asyncio's own ``close`` waits indefinitely on a plain socket. On TLS it waits for `ssl_shutdown_timeout` and drops the rest,
    and its buffer size does not include what TLS has encrypted already. ``raw`` is the transport below TLS, or the same one.
    """

    def __init__(self, transport: asyncio.Transport, raw: asyncio.Transport) -> None:
        self._transport, self._raw = transport, raw
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._written = self._taken = 0
        self._window: asyncio.TimerHandle | None = None
        self._closer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def unread(self) -> int:
        """Bytes that the kernel has not taken yet."""
        below = 0 if self._raw is self._transport else self._raw.get_write_buffer_size()
        return self._transport.get_write_buffer_size() + below

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)
        self._watch()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._finish()

    def abort(self) -> None:
        # Also below TLS, which would otherwise send its closing alert first.
        self._closing = True
        self.stop()
        self._transport.abort()
        self._raw.abort()

    def forget(self) -> None:
        # The 256 KB buffer of TLS would live until the next full garbage collection.
        self.stop()
        self._transport = self._raw = _LOST

    def stop(self) -> None:
        """Cancels the timers; for a lost connection."""
        for timer in (self._window, self._closer):
            if timer:
                timer.cancel()
        self._window = self._closer = None

    def _finish(self) -> None:
        if self._transport.is_closing():
            return
        if self.unread:
            self._closer = self._loop.call_later(_POLL_INTERVAL, self._finish)
        else:
            self._transport.close()

    def _watch(self) -> None:
        if self._window is None and self.unread:
            self._taken = self._written - self.unread
            self._window = self._loop.call_later(WINDOW_SECONDS, self._look)

    def _look(self) -> None:
        self._window = None
        if self.unread and self._written - self.unread - self._taken < _PACE:
            self.abort()
        else:
            self._watch()
