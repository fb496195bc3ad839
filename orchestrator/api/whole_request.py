"""Requests that arrive whole and in the common form, as almost all do: read by one expression instead of h11's state machine.

What is accepted here, h11 accepts too, and reads in the same way. Everything else is left to h11, and so are all refusals: other
forms of HTTP, parts of a request, more than one request, and what exceeds a limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from orchestrator.api.uvicorn_import import CLOSE_HEADER, STATUS_PHRASES, RequestResponseCycle

# A subset of h11's grammar: an origin-form target, and only printable ASCII in values. Possessive: each byte is read once.
_HEAD = re.compile(
    rb"(GET|POST|DELETE|PUT|PATCH) (/[!-~]*+) HTTP/1\.1\r\n((?:[-!#$%&'*+.^_`|~0-9A-Za-z]++:[ -~]*+\r\n){1,100}+)\r\n"
)
_LENGTH = re.compile(rb"[0-9]{1,7}")
# Fields that change how the connection is used.
_SPECIAL = frozenset({b"transfer-encoding", b"expect", b"upgrade"})
_BAD = re.compile(rb"[\r\n\0]")
_NO_CONTENT = 204


@dataclass(frozen=True)
class WholeRequest:
    """``fields`` as h11 returns them: names in lower case, values without spaces around them."""

    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes


def parse_whole(data: bytes, max_head: int) -> WholeRequest | None:
    """The request if ``data`` is exactly one in the common form; None if h11 must read it. ``max_head``: bytes."""
    if not (head := _HEAD.match(data)) or head.end() > max_head:
        return None
    fields: list[tuple[bytes, bytes]] = []
    length, hosts = b"", 0
    for line in head[3][:-2].split(b"\r\n"):
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" ")
        if name == b"content-length":
            if length or not _LENGTH.fullmatch(value):
                return None
            length = value
        elif name == b"host":
            hosts += 1
        elif name in _SPECIAL or (name == b"connection" and value.lower() != b"keep-alive"):
            return None
        fields.append((name, value))
    if hosts != 1 or len(data) != head.end() + int(length or 0):
        return None
    return WholeRequest(head[1], head[2], fields, data[head.end() :])


class WholeCycle(RequestResponseCycle):
    """The response to a request that arrived whole; h11 is not told of either.

    Head and first content are written together if the length is known; otherwise the content is chunked, as h11 does. Its body is
    not here, but in ``scope["state"]["arrived"]``, where the guard takes it: the connection keeps its last cycle.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.more_body = False
        self.message_event.set()
        self._head = b""
        self._left: int | None = None  # bytes of content that are still to be sent; None if chunked

    async def send(self, message: Any) -> None:
        """Raises RuntimeError for a response that would be malformed; the connection is closed then."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        expected = "http.response.body" if self.response_started else "http.response.start"
        if message["type"] != expected or self.response_complete:
            raise RuntimeError(f"unexpected ASGI message {message['type']}")
        if not self.response_started:
            self._start(message["status"], [*self.default_headers, *message.get("headers", ())])
            return
        self._write(message.get("body", b""), is_last=not message.get("more_body", False))

    def _start(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        lengths = [int(value) for name, value in fields if name == b"content-length"]
        if status == _NO_CONTENT:
            self._left = 0
        elif lengths:
            (self._left,) = lengths
        else:
            fields = [*fields, (b"transfer-encoding", b"chunked")]
        if any(_BAD.search(value) or _BAD.search(name) for name, value in fields):
            raise RuntimeError("a header field contains a line end")
        self.keep_alive = self.keep_alive and CLOSE_HEADER not in fields
        lines = b"".join(b"%b: %b\r\n" % field for field in fields)
        self._head = b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, STATUS_PHRASES[status], lines)
        if self._left is None:  # its content may come much later
            self.transport.write(self._head)
            self._head = b""

    def _write(self, content: bytes, *, is_last: bool) -> None:
        if self._left is None:
            data = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
            data += b"0\r\n\r\n" if is_last else b""
        else:
            self._left -= len(content)
            if self._left < 0 or (is_last and self._left):
                raise RuntimeError("the content does not have the announced length")
            data, self._head = self._head + content, b""
        if data:
            self.transport.write(data)
        if is_last:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()
