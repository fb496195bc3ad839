"""What every request passes first: who asks, how often, how much, and whether the body is JSON that means one thing.

Plain ASGI. It also answers for faults of our own, so that whatever goes wrong, the client gets a problem document.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.access import Identity, Role
from orchestrator.api.body import ClientGone, check_json, read_body
from orchestrator.api.identity import Directory, Peer, identify
from orchestrator.api.limits import Kind, Turn, Turns, name_client
from orchestrator.api.problems import MEDIA_TYPE, CrossSite, InternalError, build_headers, build_problem
from orchestrator.api.waits import Kinds
from orchestrator.config import LimitConfig
from orchestrator.errors import Forbidden, OrchestratorError, RequestError, Unauthorized

_log = logging.getLogger(__name__)

_SAFE = ("GET", "HEAD")
_ABSOLUTE = re.compile(rb"https?://[^/]*", re.IGNORECASE)


class Guard:
    """The outermost layer of the application.

    Args:
        app: gets the requests that pass, with the Identity as ``scope["state"]["who"]``.
        directory: who is who.
        limits: rate, sizes, nesting.
        kinds: says what a request is for.
    """

    def __init__(self, app: ASGIApp, directory: Directory, limits: LimitConfig, kinds: Kinds) -> None:
        self._app, self._directory, self._limits, self._kinds = app, directory, limits, kinds
        self._turns = Turns(limits.rate, limits.burst, limits.concurrent)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request (ASGI)."""
        if scope["type"] != "http":
            return
        answer = _Answer(send)
        try:
            await self._serve(scope, receive, answer)
        except ClientGone:
            pass
        except OrchestratorError as error:
            await answer.send_problem(error)
        except Exception:
            _log.exception("a fault of ours at %s %s", scope["method"], scope["raw_path"].decode("ascii", "replace")[:200])
            if answer.complete:
                return
            if answer.started:
                raise  # the server closes the connection: half an answer must not look whole
            await answer.send_problem(InternalError())

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        headers = dict(scope["headers"])
        who = self._identify(scope["state"]["peer"], headers.get(b"authorization"))
        scope = _as_origin_form(scope)
        with self._turn(who, self._kinds.find(scope["method"], scope["path"])) as turn:
            _check_site(scope["method"], headers)
            if b"%2f" in scope["raw_path"].lower():
                # The server has decoded it: it would count as a slash that parts names.
                raise RequestError("a name can't hold a slash", "leave out the %2F")
            length = headers.get(b"content-length", b"").decode("ascii", "replace") or None
            body = await read_body(receive, length, self._limits.body_bytes)
            if body:
                check_json(body, headers.get(b"content-type", b"").decode("latin-1"), self._limits.nesting)
            scope = {**scope, "state": {**scope["state"], "who": who, "turn": turn}}
            await self._app(scope, _replay(body, receive), answer.send)

    def _identify(self, peer: Peer, authorization: bytes | None) -> Identity:
        try:
            return identify(self._directory, peer, None if authorization is None else authorization.decode("latin-1"))
        except (Unauthorized, Forbidden):
            self._turns.charge(peer.key)  # who tries tokens is slowed down
            raise

    @contextlib.contextmanager
    def _turn(self, who: Identity, kind: Kind) -> Iterator[Turn]:
        if who.role is Role.OPERATOR:
            yield Turn()
        else:
            with self._turns.turn(name_client(who), kind) as turn:
                yield turn


class HeadAsGet:
    """Answers HEAD as GET (RFC 9110 9.3.2); uvicorn leaves the content out. Routes of its own would be described twice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes one request on (ASGI)."""
        head = scope["method"] == "HEAD"
        state = {**scope["state"], "head": head}
        await self._app({**scope, "method": "GET" if head else scope["method"], "state": state}, receive, send)


class _Answer:
    """The answer to one request; knows how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.complete = False

    async def send(self, message: Message) -> None:
        """Passes a message on to the server, with the fields that every answer has."""
        if message["type"] == "http.response.start":
            self.started = True
            # What one may see another may not.
            more = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    async def send_problem(self, error: OrchestratorError) -> None:
        """Answers with a problem document."""
        problem = build_problem(error)
        content = json.dumps(problem).encode()
        fields = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(content)), **build_headers(error)}
        headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
        await self.send({"type": "http.response.start", "status": problem["status"], "headers": headers})
        await self.send({"type": "http.response.body", "body": content})


def _check_site(method: str, headers: Mapping[bytes, bytes]) -> None:
    """Refuses what another site's page makes a browser send. The browser adds its user's client certificate by itself, and asks
    nobody before a form is sent. We serve no pages, so there is none of our own that could send an Origin (RFC 6454 7.3; the
    other field: https://w3c.github.io/webappsec-fetch-metadata/). Reading is left: the page does not get the answer.

    Raises:
        CrossSite: it is such a request.
    """
    site = headers.get(b"sec-fetch-site", b"none")
    if method not in _SAFE and (b"origin" in headers or site not in (b"none", b"same-origin")):
        raise CrossSite("a page of another site in a browser asks for this", "send no Origin and Sec-Fetch-Site fields")


def _as_origin_form(scope: Scope) -> Scope:
    """A server must understand the target as proxies get it, too (`GET http://host/v1/guests`, RFC 9112 3.2.2)."""
    match = _ABSOLUTE.match(scope["raw_path"])
    if not match:
        return scope
    path = scope["raw_path"][match.end() :] or b"/"
    return {**scope, "raw_path": path, "path": unquote(path.decode("ascii"))}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the application the body that was read already; after that, what the server says."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
