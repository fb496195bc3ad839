"""Sends requests, and keeps their connections for later ones: what can be repeated if a kept connection was lost."""

from __future__ import annotations

import http.client
import os
import select
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.client.transport import is_alert

# Seconds without a request. The manager closes a connection after 5 s.
MAX_IDLE = 3.0
_MOST = 64
_LOST = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    body: str | None
    fields: Mapping[str, str]
    is_idempotent: bool  # a repetition changes nothing more, and gets the same response


class KeptConnections:
    """The open connections of a client that no request uses; for several threads. ``is_local``: to a Unix socket."""

    def __init__(self, *, is_local: bool) -> None:
        self._is_local = is_local
        self._guard = threading.Lock()
        # With the time of the last response, the latest one last.
        self._idle: list[tuple[http.client.HTTPConnection, float]] = []
        self._process = os.getpid()

    def __del__(self) -> None:
        self._close_before(float("inf"))

    def exchange(
        self, request: Request, timeout: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse] | tuple[None, None]:
        """The response over a kept connection, with ``timeout`` seconds per read and write.

        None if there is none, or if the request must be sent over a new one. Raises OSError or HTTPException if the connection
        was lost and the manager may have executed the request.
        """
        while (request.is_idempotent or self._is_local) and (connection := self._take(timeout)):
            try:
                return connection, exchange(connection, request)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if not self._may_repeat(request, error):
                    raise
        return None, None

    def _take(self, timeout: float) -> http.client.HTTPConnection | None:
        with self._guard:
            if self._process != os.getpid():
                # Forked: the other process uses these connections. Closing this copy does not end them.
                self._process = os.getpid()
                self._close_before(float("inf"))
            self._close_before(time.monotonic() - MAX_IDLE)
            while self._idle:
                connection, _ = self._idle.pop()
                if not _is_readable(connection):
                    connection.timeout = timeout
                    connection.sock.settimeout(timeout)
                    return connection
                connection.close()  # the manager has closed it
            return None

    def keep(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        """After a response; closes the connection if it was not read to its end or announces the end of the connection."""
        if response.will_close or not response.isclosed():
            connection.close()
            return
        with self._guard:
            now = time.monotonic()
            self._close_before(now - MAX_IDLE)
            if len(self._idle) < _MOST:
                self._idle.append((connection, now))
                return
        connection.close()

    def _may_repeat(self, request: Request, error: Exception) -> bool:
        """Whether the request can be sent again: it is idempotent, or the connection was closed before the manager had read it.

        Then writing fails (EPIPE), or the kernel resets a Unix socket (`unix_release_sock` in net/unix/af_unix.c: unread data).
        A connection that just ends may have ended after the request was executed.
        """
        is_reset = isinstance(error, ConnectionResetError) and not isinstance(error, http.client.RemoteDisconnected)
        is_unread = self._is_local and (is_reset or isinstance(error, BrokenPipeError))
        return isinstance(error, _LOST) and (request.is_idempotent or is_unread)

    def _close_before(self, limit: float) -> None:
        while self._idle and self._idle[0][1] < limit:
            self._idle.pop(0)[0].close()


def exchange(connection: http.client.HTTPConnection, request: Request) -> http.client.HTTPResponse:
    """Raises OSError or HTTPException without a response."""
    # A server that refuses a request before it has read all of it closes the connection: writing fails, but its response can
    # still be read. So can a TLS alert: since TLS 1.3 a client certificate is refused after the client's handshake.
    failed: OSError | None = None
    try:
        connection.request(request.method, request.target, request.body, dict(request.fields))
    except (BrokenPipeError, ConnectionResetError, ssl.SSLError) as error:
        failed = error
    try:
        response = connection.getresponse()
    except ssl.SSLError as error:
        raise (error if failed is None or is_alert(error) else failed) from None
    except (OSError, http.client.HTTPException):
        if failed is None:
            raise
        raise failed from None
    response.will_close = response.will_close or failed is not None
    return response


def _is_readable(connection: http.client.HTTPConnection) -> bool:
    """Between requests this means that the connection has ended, or that the next response could not be trusted."""
    poll = select.poll()
    poll.register(connection.sock.fileno(), select.POLLIN | select.POLLRDHUP)
    return bool(poll.poll(0))
