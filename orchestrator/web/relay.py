"""How long a request that is passed on waits for the manager, and that its wait ends when the browser has gone."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

READ_SECONDS = 60.0
CHANGE_SECONDS = 600.0
SILENCE_SECONDS = 45.0
"""Between two parts of a response; streams send a comment every 15 s."""
_LONGEST = 3600.0  # wait that a request can ask for
_LONG_READS = ("/v1/audit", "/v1/evidence", "/v1/events/chain")
_LOOK_SECONDS = 0.5


def find_patience(method: str, target: str, body: bytes) -> float:
    """Seconds after which a request without a response has failed: the manager hangs. ``timeout`` of the request is added."""
    path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
    is_quick = method in ("GET", "HEAD") and path not in _LONG_READS
    try:
        wanted = min(max(0.0, float(query["timeout"][-1] if "timeout" in query else _read_timeout(body))), _LONGEST)
    except (TypeError, ValueError, OverflowError):
        wanted = 0.0
    return wanted + (READ_SECONDS if is_quick else CHANGE_SECONDS)


def _read_timeout(body: bytes) -> Any:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields.get("timeout") if isinstance(fields, dict) else None


class Hangups:
    """Ends the connections to the manager whose browsers have closed theirs.

    Otherwise each would last as long as `find_patience` allows, and a page that repeats its requests would take all connections.
    """

    def __init__(self) -> None:
        self._watched: dict[socket.socket, socket.socket] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="hangups", daemon=True).start()

    @contextmanager
    def watching(self, browser: socket.socket, manager: socket.socket) -> Iterator[None]:
        with self._changed:
            self._watched[browser] = manager
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                del self._watched[browser]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched)
                browsers = {browser.fileno(): browser for browser in self._watched}
            poll = select.poll()
            for number in browsers:
                poll.register(number, select.POLLRDHUP)  # and POLLHUP, POLLERR
            for number, _ in poll.poll(_LOOK_SECONDS * 1000):
                self._end(browsers[number])
            threading.Event().wait(_LOOK_SECONDS / 10)  # a request that is ending is still watched

    def _end(self, browser: socket.socket) -> None:
        with self._changed:
            if manager := self._watched.get(browser):
                # Not that of SSLSocket, which another thread is reading.
                with suppress(OSError):
                    socket.socket.shutdown(manager, socket.SHUT_RDWR)
