"""Serves the page on loopback, and passes its requests on to the manager as the user who runs the command."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any
from urllib.parse import unquote

from orchestrator.client import Client
from orchestrator.client.problems import MEDIA_TYPE, build_problem
from orchestrator.client.transport import TimedOut, Unreachable
from orchestrator.errors import NotFound, OrchestratorError, RequestError
from orchestrator.web.files import SAFETY_FIELDS, find_file
from orchestrator.web.relay import SILENCE_SECONDS, Hangups, find_patience
from orchestrator.web.session import Session

_LONGEST_BODY = 1 << 20
_REQUEST_SECONDS = 30.0
"""For each part of a request, and for a page that does not read."""
CONNECTIONS = 48
_PIECE = 64 << 10
_FORWARDED = ("content-type", "if-match", "last-event-id")
_RETURNED = ("allow", "content-type", "etag", "retry-after", "location")
_NO_CONTENT = (204, 304)
# Of the API; a dot as a segment, or an encoded character that the manager would decode, could name another path.
_TARGET = re.compile(r"/v1/[A-Za-z0-9._~/%-]*(?:\?[A-Za-z0-9._~=&%+:-]*)?")


class WebServer(ThreadingHTTPServer):
    """Args: ``port`` on 127.0.0.1, 0 for any free one. Raises OSError.

    Attributes:
        places: of connections; one without a place is closed.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, client: Client, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.client = client
        self.session = Session(self.server_port)
        self.hangups = Hangups()
        self.places = threading.BoundedSemaphore(CONNECTIONS)

    @property
    def address(self) -> str:
        """To open once. The word is in the fragment, which browsers do not send, so that no log has it."""
        return f"http://127.0.0.1:{self.server_port}/#{self.session.word}"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The browser has closed the connection, or does not read."""


class _Handler(BaseHTTPRequestHandler):
    """One request per connection."""

    protocol_version = "HTTP/1.1"
    timeout = _REQUEST_SECONDS
    server: WebServer
    connection: socket

    def log_message(self, *_: object) -> None:
        """Requests are in the log of the manager."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called for what is not HTTP: the words of the request are not repeated."""
        self._send(code, {"Content-Type": "text/plain"}, b"bad request\n")

    def _handle(self) -> None:
        self.close_connection = True
        try:
            fields = self._read_fields()
            session = self.server.session
            session.check_host(fields.get("host", ""))
            if self.command in ("GET", "HEAD") and (file := find_file(self.path)):
                self._send(200, {"Content-Type": file.media}, file.content)
                return
            session.check_site(fields)
            if (self.command, self.path) == ("POST", "/session"):
                secret = session.open(self._read_body(fields).decode("ascii", "replace"))
                self._send(200, {"Content-Type": "application/json"}, json.dumps({"token": secret}).encode())
                return
            session.check_secret(fields.get("authorization", ""))
            self._forward(fields)
        except Unreachable as error:
            self._send_problem(error, HTTPStatus.GATEWAY_TIMEOUT if isinstance(error, TimedOut) else HTTPStatus.BAD_GATEWAY)
        except OrchestratorError as error:
            self._send_problem(error)

    # Methods that the API does not know are for the manager to refuse.
    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle

    def _send_problem(self, error: OrchestratorError, status: HTTPStatus | None = None) -> None:
        problem = {**build_problem(error), **({"status": int(status), "title": status.phrase} if status else {})}
        self._send(int(str(problem["status"])), {"Content-Type": MEDIA_TYPE}, json.dumps(problem).encode())

    def _read_fields(self) -> dict[str, str]:
        """By name in lower case. Raises RequestError if one occurs twice: programs differ in which they use."""
        found: dict[str, str] = {}
        for name, value in self.headers.items():
            if name.lower() in found or not value.isprintable():
                raise RequestError("the request has a field twice, or with control characters")
            found[name.lower()] = value
        return found

    def _read_body(self, fields: Mapping[str, str]) -> bytes:
        length = fields.get("content-length", "0")
        if "transfer-encoding" in fields or not re.fullmatch(r"[0-9]{1,7}", length) or int(length) > _LONGEST_BODY:
            raise RequestError("the request has no valid length", f"send at most {_LONGEST_BODY} bytes, with Content-Length")
        return self.rfile.read(int(length))

    def _forward(self, fields: Mapping[str, str]) -> None:
        segments = unquote(self.path.partition("?")[0]).split("/")
        if not _TARGET.fullmatch(self.path) or any(segment in (".", "..") for segment in segments):
            raise NotFound("no such endpoint")
        if self.request_version != "HTTP/1.1":
            raise RequestError("the request is not HTTP/1.1", "use a program that speaks HTTP/1.1")
        body = self._read_body(fields)
        passed = {name: fields[name] for name in _FORWARDED if name in fields}

        patience, used = find_patience(self.command, self.path, body), []

        def watching(manager: socket) -> AbstractContextManager[None]:
            used.append(manager)
            return self.server.hangups.watching(self.connection, manager)

        with self.server.client.forward(self.command, self.path, body or None, passed, patience, watching) as response:
            used[0].settimeout(SILENCE_SECONDS)
            self._stream(response)

    def _stream(self, response: http.client.HTTPResponse) -> None:
        """Passes the content on as it comes. If it is cut off, its end is missing here too: the browser reports an error."""
        returned = {name.title(): value for name in _RETURNED if (value := response.getheader(name))}
        length = response.getheader("Content-Length")
        if self.command == "HEAD" or response.status in _NO_CONTENT:
            self._begin(response.status, {**returned, **({"Content-Length": length} if length else {})})
            return
        is_chunked = length is None
        self._begin(response.status, {**returned, **({"Content-Length": length} if length else {"Transfer-Encoding": "chunked"})})
        while piece := response.read1(_PIECE):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked and not response.length:
            self.wfile.write(b"0\r\n\r\n")

    def _send(self, status: int, fields: Mapping[str, str], content: bytes) -> None:
        self._begin(status, {**fields, "Content-Length": str(len(content))})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self, status: int, fields: Mapping[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {**fields, **SAFETY_FIELDS, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
