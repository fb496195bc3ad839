"""Identifies the caller of every request, applies the rate limit, and checks header fields, target and body.

Plain ASGI. Internal errors are reported here too, so that the client always gets a problem document.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.api.body import ClientDisconnected, check_media_type, parse_json, read_body
from orchestrator.api.identity import IdentityMap, Peer, identify
from orchestrator.api.limits import Admission, RateLimiter, name_client
from orchestrator.api.parameters import NO_BODY
from orchestrator.api.routing import RouteTable
from orchestrator.client.problems import MEDIA_TYPE, CrossSite, InternalError, build_headers, build_problem
from orchestrator.config import LimitConfig
from orchestrator.errors import Forbidden, OrchestratorError, RequestError, TooMany, Unauthorized
from orchestrator.model.access import Identity, Role
from orchestrator.web.files import SAFETY_FIELDS, PageFile, find_file

_log = logging.getLogger(__name__)

_SAFE = ("GET", "HEAD")
_ABSOLUTE = re.compile(rb"https?://[^/]*", re.IGNORECASE)
# RFC 3986 3.2.2, 3.2.3; without user and password (RFC 9110 7.2).
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
# Header fields that the application reads. Others, such as cookies, are dropped.
_APP_READS = (b"host", b"content-type", b"if-match", b"last-event-id")
# Fields of which several lines are one list (RFC 9110 5.3). Of other fields, some programs use the first line, some the last.
_LISTS = (b"if-match",)
_CHECKED = frozenset({*_APP_READS, b"authorization", b"content-encoding", b"content-length", b"origin", b"sec-fetch-site"})
_MAX_QUERY = 16
# Seconds before the response "too many requests", so that a connection gets at most one per second.
REFUSAL_DELAY = 1.0
_PIECE = 64 << 10
_ALWAYS_SENT = ("Cache-Control", "X-Content-Type-Options")


class Guard:
    """The outermost layer: ``app`` gets the requests that pass.

    In ``scope["state"]`` are the Identity as ``caller``, and the parsed JSON as ``body``. With ``has_page`` the files of the web
    page are sent to every peer of the TLS port: they hold nothing of the host.
    """

    def __init__(
        self, app: ASGIApp, identities: IdentityMap, limits: LimitConfig, table: RouteTable, *, has_page: bool = False
    ) -> None:
        self._app, self._directory, self._limits, self._table = app, identities, limits, table
        self._has_page = has_page
        self.limiter = RateLimiter(limits.rate, limits.burst, limits.concurrent)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = _Response(send, scope["state"]["hold"])
        try:
            await self._serve(scope, receive, answer)
        except ClientDisconnected:
            pass
        except TooMany as error:
            await asyncio.sleep(REFUSAL_DELAY)
            await answer.send_problem(error)
        except OrchestratorError as error:
            await answer.send_problem(error)
        except Exception:
            _log.exception("internal error: %s %s", scope["method"], scope["raw_path"].decode("ascii", "replace")[:200])
            if answer.complete:
                return
            if answer.started:
                raise  # the server closes the connection: a truncated response must not look complete
            await answer.send_problem(InternalError())

    async def _serve(self, scope: Scope, receive: Receive, answer: _Response) -> None:
        # Taken, also from a request that is refused: the connection keeps the scope until its next request.
        peer, arrived = scope["state"]["peer"], scope["state"].pop("arrived")
        headers = self._read_fields(peer, scope["headers"])
        if self._has_page and not peer.local and scope["method"] in _SAFE and (file := find_file(scope["path"])):
            self.limiter.consume(peer.rate_limit_key)
            await answer.send_file(file)
            return
        caller = self._identify(peer, headers.get(b"authorization"))
        scope = _as_origin_form(scope)
        state = {"peer": peer, "caller": caller, "arrived": arrived}
        if caller.role is Role.OPERATOR:
            await self._pass(scope, receive, answer, headers, {**state, "admission": Admission()})
            return
        kind = self._table.find_kind(scope["method"], scope["path"])
        with self.limiter.admit(name_client(caller), kind) as admission:
            await self._pass(scope, receive, answer, headers, {**state, "admission": admission})

    async def _pass(
        self, scope: Scope, receive: Receive, answer: _Response, headers: Mapping[bytes, bytes], state: dict[str, Any]
    ) -> None:
        _check_site(scope["method"], headers, has_page=self._has_page and not state["peer"].local)
        _check_target(scope)
        length = headers.get(b"content-length", b"").decode("ascii", "replace") or None
        body = await read_body(receive, length, self._limits.body_bytes, state.pop("arrived"))
        state["body"] = NO_BODY
        if body:
            check_media_type(*(headers.get(name, b"").decode("latin-1") for name in (b"content-type", b"content-encoding")))
            state["body"] = parse_json(body, self._limits.nesting)
        fields = [(name, value) for name, value in scope["headers"] if name in _APP_READS]
        await self._app({**scope, "headers": fields, "state": state}, receive, answer.send)

    def _read_fields(self, peer: Peer, fields: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
        # Before identification: with two Authorization fields the caller is ambiguous.
        try:
            return read_fields(fields)
        except RequestError:
            self.limiter.consume(peer.rate_limit_key)
            raise

    def _identify(self, peer: Peer, authorization: bytes | None) -> Identity:
        try:
            return identify(self._directory, peer, None if authorization is None else authorization.decode("latin-1"))
        except (Unauthorized, Forbidden):
            self.limiter.consume(peer.rate_limit_key)  # slows down guessing of tokens
            raise


class _Response:
    """The response to one request; reports the number of bytes that wait to be sent to ``hold``."""

    def __init__(self, send: Send, hold: Callable[[int], object]) -> None:
        self._send, self._hold = send, hold
        self.started = self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            # Callers see different content.
            more = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        elif len(message.get("body", b"")) > _PIECE:
            await self._send_pieces(message["body"], more=message.get("more_body", False))
            return
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    async def _send_pieces(self, body: bytes, *, more: bool) -> None:
        """Sends pieces: after each the server waits until most of it was read. Reports the bytes that are left."""
        for begin in range(0, len(body), _PIECE):
            left = len(body) - begin - _PIECE
            self._hold(max(left, 0))
            piece = body[begin : begin + _PIECE]
            await self._send({"type": "http.response.body", "body": piece, "more_body": more or left > 0})
        self.complete = not more

    async def send_file(self, file: PageFile) -> None:
        fields = {"Content-Type": file.media, "Content-Length": str(len(file.content)), **SAFETY_FIELDS}
        headers = [(name.lower().encode(), value.encode()) for name, value in fields.items() if name not in _ALWAYS_SENT]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send({"type": "http.response.body", "body": file.content})

    async def send_problem(self, error: OrchestratorError) -> None:
        problem = build_problem(error)
        content = json.dumps(problem).encode()
        fields = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(content)), **build_headers(error)}
        headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
        await self.send({"type": "http.response.start", "status": problem["status"], "headers": headers})
        await self.send({"type": "http.response.body", "body": content})


def read_fields(fields: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The checked header fields by name. The connection limits their number and length.

    Raises RequestError if a field that is not a list occurs twice, or if Host is invalid (RFC 9112 3.2).
    """
    found: dict[bytes, bytes] = {}
    for name, value in fields:
        if name not in _CHECKED:
            continue
        if name in found and name not in _LISTS:
            raise RequestError(f"the request has the field {name.decode('ascii').title()} twice", "send it once")
        found[name] = value
    if not _HOST.fullmatch(found.get(b"host", b"")):
        raise RequestError("the field Host is not a host name or address with a port", "send the host of the URL")
    return found


def _check_target(scope: Scope) -> None:
    if b"%2f" in scope["raw_path"].lower():
        # The server has decoded it: it would count as a separator.
        raise RequestError("a name must not contain a slash", "omit the %2F")
    if scope["query_string"].count(b"&") >= _MAX_QUERY:
        raise RequestError(f"the query has more than {_MAX_QUERY} parts", "send fewer")


def _check_site(method: str, headers: Mapping[bytes, bytes], *, has_page: bool) -> None:
    """Raises CrossSite for a change that a page of another site makes a browser send, with its user's client certificate.

    Unless the manager serves its page, a request with Origin comes from another site (RFC 6454 7.3; Sec-Fetch-Site:
    https://w3c.github.io/webappsec-fetch-metadata/). Reads are allowed: the page does not get the response. The manager's own
    page sends a token, which no other page has; without a token its requests are refused too, whatever a browser says of them.
    """
    site = headers.get(b"sec-fetch-site", b"none")
    own = site == b"same-origin" and headers.get(b"origin") == b"https://" + headers.get(b"host", b"")
    if has_page and own and b"authorization" in headers:
        return
    if method not in _SAFE and (b"origin" in headers or site not in (b"none", b"same-origin")):
        raise CrossSite("cross-site request refused", "outside a browser, omit Origin and Sec-Fetch-Site")


def _as_origin_form(scope: Scope) -> Scope:
    # A server must accept the absolute form too (`GET http://host/v1/guests`, RFC 9112 3.2.2).
    match = _ABSOLUTE.match(scope["raw_path"])
    if not match:
        return scope
    path = scope["raw_path"][match.end() :] or b"/"
    return {**scope, "raw_path": path, "path": unquote(path.decode("ascii"))}
