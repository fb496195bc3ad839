"""Serves the page on loopback, and passes its requests on to the manager as the user who runs the command."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any
from urllib.parse import unquote

from orchestrator.client import Client
from orchestrator.client.problems import MEDIA_TYPE, build_problem
from orchestrator.errors import NotFound, OrchestratorError, RequestError
from orchestrator.web.files import SAFETY_FIELDS, find_file
from orchestrator.web.session import Session

_LONGEST_BODY = 1 << 20
_REQUEST_SECONDS = 30.0
"""For each part of a request, and for a page that does not read."""
CONNECTIONS = 48
_PIECE = 64 << 10
_FORWARDED = ("content-type", "if-match", "last-event-id")
_RETURNED = ("content-type", "etag", "retry-after", "location")
_WAIT_SECONDS = 3700.0
"""The longest wait of the API is an hour."""
# Of the API; a dot as a segment, or an encoded character that the manager would decode, could name another path.
_TARGET = re.compile(r"/v1/[A-Za-z0-9._~/%-]*(?:\?[A-Za-z0-9._~=&%+:-]*)?")


class WebServer(ThreadingHTTPServer):
    """Args: ``port`` on 127.0.0.1, 0 for any free one. Raises OSError."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, client: Client, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.client = client
        self.session = Session(self.server_port)
        self._places = threading.BoundedSemaphore(CONNECTIONS)

    @property
    def address(self) -> str:
        """To open once. The word is in the fragment, which browsers do not send, so that no log has it."""
        return f"http://127.0.0.1:{self.server_port}/#{self.session.word}"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The browser has closed the connection, or does not read."""


class _Handler(BaseHTTPRequestHandler):
    """One request per connection."""

    protocol_version = "HTTP/1.1"
    timeout = _REQUEST_SECONDS
    server: WebServer
    connection: socket

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

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
            if self.command == "GET" and (file := find_file(self.path)):
                self._send(200, {"Content-Type": file.media}, file.content)
                return
            session.check_site(fields)
            if (self.command, self.path) == ("POST", "/session"):
                secret = session.open(self._read_body(fields).decode("ascii", "replace"))
                self._send(200, {"Content-Type": "application/json"}, json.dumps({"token": secret}).encode())
                return
            session.check_secret(fields.get("authorization", ""))
            self._forward(fields)
        except OrchestratorError as error:
            problem = build_problem(error)
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
        body = self._read_body(fields)
        passed = {name: fields[name] for name in _FORWARDED if name in fields}
        with self.server.client.forward(self.command, self.path, body or None, passed, _WAIT_SECONDS) as response:
            self._stream(response)

    def _stream(self, response: http.client.HTTPResponse) -> None:
        """Without a length: the end of the connection is the end of the response."""
        returned = {name.title(): value for name in _RETURNED if (value := response.getheader(name))}
        self._begin(response.status, returned)
        while piece := response.read1(_PIECE):
            self.wfile.write(piece)

    def _send(self, status: int, fields: Mapping[str, str], content: bytes) -> None:
        self._begin(status, {**fields, "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _begin(self, status: int, fields: Mapping[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {**fields, **SAFETY_FIELDS, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
