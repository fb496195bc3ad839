"""One connection: uvicorn's HTTP over h11, with bounds on the work, memory and log lines that a client can cause."""

from __future__ import annotations

import asyncio
import json
import re
import select
import sys
import time
from typing import cast
from urllib.parse import unquote

import h11

from orchestrator.api.identity import Peer
from orchestrator.api.outgoing import Outgoing
from orchestrator.api.shares import Place, Shares
from orchestrator.api.uvicorn_import import Config, H11Protocol, ServerState
from orchestrator.api.whole_request import WholeCycle, parse_whole
from orchestrator.client.problems import MEDIA_TYPE, build_problem
from orchestrator.errors import RequestError

IDLE_TIMEOUT = 30.0
LINGER_SECONDS = 2.0
POLL_INTERVAL = 1.0
# Bytes and lines of a request's head. Browsers and proxies send some 2 KB and 30 lines.
_MAX_HEAD = 16 << 10
_MAX_LINES = 101
# One chunk of a body costs as much to parse as 4 KB in one chunk.
_MAX_CHUNKS = 1000
_SLICE = 16 << 10
_FRAMINGS = {b"content-length", b"transfer-encoding"}
_BETWEEN = {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}
_BLANK_LINE = re.compile(rb"\n\r?\n")


class Refused(h11.RemoteProtocolError):
    """Valid HTTP, but over a limit, or ambiguous."""


class Parser(h11.Connection):
    """Adds limits to h11's parser: number of fields and chunks, length of a head that arrives in one piece."""

    _chunks = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Raises Refused if head, fields or chunks exceed a limit, or if two fields define the body's length."""
        if self.their_state is h11.IDLE:
            self._chunks = 0
            _check_head(self.trailing_data[0])
        event = super().next_event()
        if isinstance(event, h11.Request) and _FRAMINGS <= {name for name, _ in event.headers}:
            # A proxy may use the other field, and see a different request after this one (RFC 9112 6.1, 11.2).
            raise Refused("it has both Content-Length and Transfer-Encoding")
        if isinstance(event, h11.Data) and event.chunk_start:
            self._chunks += 1
            if self._chunks > _MAX_CHUNKS:
                raise Refused(f"its body is in more than {_MAX_CHUNKS} chunks")
        return event


class PeerConnection(H11Protocol):
    """Adds the peer to each request, as ``scope["state"]["peer"]``; the connection is counted as ``place`` in ``shares``."""

    def __init__(self, config: Config, state: ServerState, peer: Peer, place: Place, shares: Shares) -> None:
        super().__init__(config, state, {"peer": peer, "hold": lambda size: shares.hold(place, size), "arrived": None})
        self.peer, self._place, self._shares = peer, place, shares
        self.conn = Parser(h11.SERVER, _MAX_HEAD)
        # Also if the process configures uvicorn's logger: it would write one line per request.
        self.access_log = False
        self._pending = bytearray()
        self._half_closed = self._looking = False
        self._waiting: asyncio.TimerHandle | None = None
        place.busy = self._is_busy

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._outgoing = cast(Outgoing, transport)
        self._place.close = self._outgoing.abort
        super().connection_made(cast(asyncio.Transport, transport))
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self._serve_whole(data):
            self._pending += data
            self._feed()
        self._watch()
        if self.flow.read_paused and self._is_answering():
            self._look_for_end()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Returns whether the client still gets a response: not over TLS, where asyncio closes both directions."""
        if self.scheme == "https" or not self._is_busy() or self._has_hung_up():
            return False
        self._half_closed = True
        self._look_for_end()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._outgoing.stop()
        self._shares.release(self._place)
        self._pending.clear()
        super().connection_lost(exc)
        self._outgoing.forget()
        self._stop_waiting()

    def on_response_complete(self) -> None:
        cycle = self.cycle
        self._place.since = time.monotonic()
        super().on_response_complete()
        self._feed()
        if self._half_closed and not self._is_answering():
            self.transport.close()
        elif self.cycle is cycle and cycle.more_body:
            # The request was refused before all of it arrived. Reads the rest for a moment, so that the client gets the response.
            self.loop.call_later(LINGER_SECONDS, self._end_refused, cycle)

    def timeout_keep_alive_handler(self) -> None:
        # uvicorn's time starts when the response has been written, here when it has been read.
        if self._outgoing.unread:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        reason = sys.exc_info()[1]
        text = f"request refused: {reason}" if isinstance(reason, Refused) else f"malformed HTTP request: {msg}"
        problem = build_problem(RequestError(text))
        content = json.dumps(problem).encode()
        fields = [("content-type", MEDIA_TYPE), ("content-length", str(len(content))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=fields, reason=b"Bad Request"),
            h11.Data(content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _should_upgrade(self) -> bool:
        # Upgrades are ignored, as RFC 9110 7.8 allows. uvicorn's method logs two warnings per request.
        return False

    def _serve_whole(self, data: bytes) -> bool:
        """Starts to serve a request in the common form. False if h11 must read the data, or is reading a request."""
        is_between = not self._pending and self.conn.states == _BETWEEN and not self.conn.trailing_data[0]
        if not is_between or self._is_answering() or not (request := parse_whole(data, _MAX_HEAD)):
            return False
        self._unset_keepalive_if_required()
        path, _, query = request.target.partition(b"?")
        self.scope = {
            "type": "http", "asgi": {"version": self.asgi_version, "spec_version": "2.3"}, "http_version": "1.1",
            "server": self.server, "client": self.client, "scheme": self.scheme or "http", "method": request.method.decode(),
            "root_path": "", "path": unquote(path.decode()), "raw_path": path, "query_string": query,
            "headers": request.fields, "state": {**self.app_state, "arrived": request.body},
        }  # fmt: skip
        self.cycle = WholeCycle(
            scope=self.scope, conn=self.conn, transport=self.transport, flow=self.flow, logger=self.logger,
            access_logger=self.access_logger, access_log=False, default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(), on_response=self.on_response_complete,
        )  # fmt: skip
        task = self.loop.create_task(self.cycle.run_asgi(self.app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return True

    def _feed(self) -> None:
        """Passes h11 at most what it parses in a few milliseconds, and nothing while a response is pending."""
        if self._pending and isinstance(self.cycle, WholeCycle) and self._is_answering():
            self.flow.pause_reading()  # as h11's PAUSED
            return
        while self._pending and not self.transport.is_closing() and len(self.conn.trailing_data[0]) <= _SLICE:
            piece = bytes(self._pending[:_SLICE])
            del self._pending[:_SLICE]
            super().data_received(piece)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_busy(self) -> bool:
        return self._is_answering() and not self.cycle.more_body

    def _end_refused(self, cycle: object) -> None:
        if self.cycle is cycle and self.cycle.more_body:
            self.transport.close()

    def _look_for_end(self) -> None:
        """Detects a disconnect while asyncio does not read: after the client's half-close, and while its next request waits."""
        if not self._looking:
            self._looking = True
            self.loop.call_later(POLL_INTERVAL, self._look)

    def _look(self) -> None:
        self._looking = False
        if self.transport.is_closing() or not (self._half_closed or self.flow.read_paused):
            return
        if self._has_hung_up():
            self._outgoing.abort()
        else:
            self._look_for_end()

    def _has_hung_up(self) -> bool:
        """Whether the peer has closed, for unix(7) sockets both directions (POLLHUP; one direction is POLLRDHUP alone)."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        ends = select.POLLHUP | select.POLLERR | (select.POLLRDHUP if self.scheme == "https" else 0)
        return any(event & ends for _, event in poll.poll(0))

    def _watch(self) -> None:
        """Closes a connection without a complete request within ``IDLE_TIMEOUT`` seconds."""
        if self._is_answering():
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(IDLE_TIMEOUT, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def _check_head(data: bytes) -> None:
    end = _BLANK_LINE.search(data, 0, _MAX_HEAD)
    if not end and len(data) >= _MAX_HEAD:
        raise Refused(f"its head is longer than {_MAX_HEAD} bytes")
    if data.count(b"\n", 0, end.start() if end else len(data)) > _MAX_LINES:
        raise Refused(f"its head has more than {_MAX_LINES - 1} fields")
