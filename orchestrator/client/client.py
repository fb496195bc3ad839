"""The typed client of the manager's HTTP API, over its Unix socket or its TLS port.

    client = Client(Path("/run/nohype/nohyped.sock"))
    guest = client.create({"name": "web", "memory": "1G", "image": "minimal", "id": "order-17"})
    client.stop("web", version=guest["version"])  # raises Stale if it has changed since
    for event in client.follow():
        print(event["kind"], event["subject"])

Results are plain JSON types, described in `shapes`. Every method raises an OrchestratorError of the class that corresponds to the
problem code (each can raise `Unauthorized`, `Forbidden`, `TooMany`), or `Unreachable` without a connection.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

from orchestrator.client import shapes
from orchestrator.client.answers import check_stream, parse_stream, read_answer, read_problem, read_text
from orchestrator.client.console import ConsoleOutput, follow_console
from orchestrator.client.kept import KeptConnections, Request, exchange
from orchestrator.client.networks import NetworkCalls
from orchestrator.client.records import RecordCalls
from orchestrator.client.switches import SwitchCalls
from orchestrator.client.transport import (
    TlsConnection,
    UnixConnection,
    Unreachable,
    build_context,
    map_connection_error,
    parse_url,
)
from orchestrator.errors import LedgerError, RequestError, TooMany

_QUICK = 120.0
SLOW_SECONDS = 10.0
MARGIN_SECONDS = 30.0
_AUDIT = 600.0
# Three of the heartbeats that the manager sends.
_SILENCE = 45.0
_PAUSE = 1.0
# Characters of a header field without spaces (RFC 9110 5.5).
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Client(NetworkCalls, RecordCalls, SwitchCalls):
    """Calls `nohyped`. Several threads can share a client: each request in progress has its own connection.

    A connection is used again within 3 s. Over TLS, a change that cannot be repeated safely always gets a new one.

    Args:
        where: the manager's Unix socket, or the address of its TLS port (``https://host:8443``).
        token: for the TLS port, instead of a client certificate.
        ca: PEM file with the CA of the manager's certificate; None for those of the system.
        certificate: PEM file with the client certificate (and, if ``key`` is None, its key).
        key: PEM file with the key of the client certificate, without a passphrase.
        on_slow: called from another thread when a request that normally takes less than 1 s has had no response for 10 s.

    Raises:
        RequestError: the address is not an https URL, the token has invalid characters, or a file cannot be used.
    """

    def __init__(
        self,
        where: Path | str,
        *,
        token: str | None = None,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        on_slow: Callable[[], object] | None = None,
    ) -> None:
        if token and not _TOKEN.fullmatch(token):
            # Not shown: it may contain most of a valid token.
            raise RequestError("the token contains invalid characters", "use the word printed by `nohype token new`")
        self._where, self._token, self._on_slow = where, token, on_slow
        self._kept = KeptConnections(is_local=isinstance(where, Path))
        if isinstance(where, str):
            self._address, self._tls = parse_url(where), build_context(ca, certificate, key)

    def version(self) -> str:
        return str(self._ask(shapes.Version, "GET", "/v1/version")["version"])

    def survey(self) -> shapes.Survey:
        """What the host has. Raises Forbidden for tenants."""
        survey: shapes.Survey = self._ask(shapes.Survey, "GET", "/v1/survey")
        return survey

    def guests(self) -> list[shapes.Guest]:
        """All guests that the caller may see."""
        guests: list[shapes.Guest] = self._ask(list[shapes.Guest], "GET", "/v1/guests")
        return guests

    def guest(self, name: str) -> shapes.Guest:
        """Raises NotFound if the guest does not exist or belongs to another tenant."""
        guest: shapes.Guest = self._ask(shapes.Guest, "GET", _path(name))
        return guest

    def plan(self, request: Mapping[str, object]) -> shapes.Guest:
        """What a guest would get; the fields are those of `GuestRequest`. Claims nothing.

        Raises:
            RequestError: a field is invalid.
            NotFound: the image does not exist.
            Conflict: the name is in use.
            NoRoom, QuotaExceeded: ``reasons`` lists why each candidate was refused.
        """
        planned: shapes.Guest = self._ask(shapes.Guest, "POST", "/v1/plans", request)
        return planned

    def create(self, request: Mapping[str, object], *, timeout: float = 600.0) -> shapes.Guest:
        """Creates and starts a guest; the fields are those of `GuestRequest`. Returns when its vCPUs run, before it has booted.

        With an ``id`` the request can be repeated after a lost connection: the same id and fields create one guest.

        Raises:
            RequestError, NotFound, Conflict, NoRoom, QuotaExceeded: as ``plan`` does.
            HostError, HypervisorError, GuestError: the guest could not be started; everything was undone.
        """
        made: shapes.Guest = self._ask(shapes.Guest, "POST", "/v1/guests", request, timeout)
        return made

    def start(self, name: str, *, version: int | None = None, timeout: float = 600.0) -> shapes.Guest:
        """Starts a stopped guest.

        Args:
            version: the version that the guest must have; None for any.

        Raises:
            NotFound: as ``guest`` does.
            Conflict: the guest's state does not allow it.
            Stale: the guest has another version.
            HostError, HypervisorError, GuestError: the guest could not be started.
        """
        return self._change(name, "start", version, timeout)

    def stop(self, name: str, timeout: float = 60.0, *, version: int | None = None) -> shapes.Guest:
        """Shuts a guest down; after ``timeout`` seconds it is forced off. It keeps its resources.

        Raises NotFound, Conflict, Stale.
        """
        return self._change(name, "stop", version, timeout + _QUICK, {"timeout": timeout})

    def restart(self, name: str, timeout: float = 60.0, *, version: int | None = None) -> shapes.Guest:
        """Like ``stop``, then ``start``; raises what they raise."""
        return self._change(name, "restart", version, timeout + _AUDIT, {"timeout": timeout})

    def kill(self, name: str, *, version: int | None = None) -> shapes.Guest:
        """Forces a guest off. It keeps its resources. Raises NotFound, Conflict, Stale."""
        return self._change(name, "kill", version, _QUICK)

    def delete(self, name: str, *, version: int | None = None) -> None:
        """Forces a guest off if it runs, and releases its resources. Raises NotFound, Conflict, Stale."""
        self._ask(None, "DELETE", _path(name), timeout=_QUICK, headers=_if_match(version))

    def disengage(self, name: str, *, version: int | None = None) -> shapes.Guest:
        """Ends the boot of a running guest; no-op if it is over. Raises NotFound, GuestError, Stale."""
        return self._change(name, "disengage", version, _QUICK)

    def exits(self, name: str, *, phase: Literal["boot", "run"] | None = None) -> shapes.ExitReport:
        """VM exits of a running guest by hardware reason, since its start or in one phase. Raises NotFound, GuestError."""
        query = f"?{urlencode({'phase': phase})}" if phase else ""
        report: shapes.ExitReport = self._ask(shapes.ExitReport, "GET", f"{_path(name)}/exits{query}")
        return report

    def wait_ready(self, name: str, timeout: float) -> str:
        """Waits ``timeout`` seconds for the guest to report ready; returns the line. Raises NotFound, Conflict, GuestError."""
        query = urlencode({"timeout": timeout})
        return str(self._ask(shapes.Ready, "GET", f"{_path(name)}/ready?{query}", timeout=timeout + MARGIN_SECONDS)["line"])

    def send_command(self, name: str, line: str, timeout: float) -> str:
        """Sends a line to the guest's console; waits ``timeout`` seconds for the reply. Raises NotFound, Conflict, GuestError."""
        body = {"line": line, "timeout": timeout}
        return str(self._ask(shapes.Answer, "POST", f"{_path(name)}/tell", body, timeout + MARGIN_SECONDS)["answer"])

    def quarantined(self) -> list[shapes.Quarantined]:
        """Raises Forbidden for tenants."""
        guests: list[shapes.Quarantined] = self._ask(list[shapes.Quarantined], "GET", "/v1/quarantine")
        return guests

    def clear_quarantine(self, name: str, *, force: bool = False) -> None:
        """Releases the resources of a guest in quarantine if they are verified clean now, with ``force`` in any case.

        Raises:
            Forbidden: the caller is not an operator.
            NotFound: the guest is not in quarantine.
            Conflict: verification failed.
        """
        self._ask(None, "DELETE", f"/v1/quarantine/{quote(name, safe='')}?{urlencode({'force': str(force).lower()})}")

    def events(self, after: int | None = None, limit: int = 1000) -> list[shapes.Event]:
        """Up to ``limit`` events with ids above ``after`` that the caller may see, oldest first; None for the newest events."""
        query = {"limit": limit} if after is None else {"limit": limit, "after": after}
        found: list[shapes.Event] = self._ask(list[shapes.Event], "GET", f"/v1/events?{urlencode(query)}")
        return found

    def follow(self, after: int | None = None) -> Iterator[shapes.Event]:
        """Yields events as they happen, indefinitely; starts after the event id ``after`` (None: with the next event).

        Reconnects after a lost connection, and retries while the manager is busy. Raises OrchestratorError if the first
        connection fails, or if the manager refuses the request.
        """
        if after is None:
            # Read first, so that no event is missed if the connection is lost before the first one.
            after = max((event["id"] for event in self.events(limit=1)), default=0)
        reached = False
        while True:
            pause = _PAUSE
            try:
                with self._open("GET", "/v1/events/stream", None, {"Last-Event-ID": str(after)}, _SILENCE) as response:
                    check_stream(response)
                    reached = True
                    for event in parse_stream(response):
                        after = event["id"]
                        yield event
            except (Unreachable, TooMany, LedgerError, OSError, http.client.HTTPException) as error:
                if not reached:
                    raise
                if isinstance(error, TooMany):
                    pause = max(pause, error.wait)
            time.sleep(pause)

    def read_console(self, name: str, lines: int = 0, *, follow: bool = True) -> Iterator[ConsoleOutput]:
        """Yields the output of a guest's serial console: the last ``lines`` lines, then what it prints while it runs.

        Reconnects after a lost connection. Without ``follow`` it returns after the output so far. Otherwise it raises the reason
        when the guest has ended or was replaced. Raises OrchestratorError if the first connection fails, and NotFound.
        """
        target = f"{_path(name)}/console?{urlencode({'lines': lines, 'follow': str(follow).lower()})}"
        return follow_console(lambda headers: self._open("GET", target, None, headers, _SILENCE))

    def type_console(self, name: str, uuid: str, data: bytes) -> int:
        """Types on the console of the guest with this id (of `ConsoleOutput`), at most 4,096 bytes.

        Returns how many bytes the console took: the rest can be sent again later. Raises NotFound if the guest has ended or was
        replaced, and GuestError.
        """
        body = {"uuid": uuid, "data": base64.b64encode(data).decode()}
        return int(self._ask(shapes.ConsoleTyped, "POST", f"{_path(name)}/console", body)["taken"])

    def metrics(self) -> str:
        """Metrics in Prometheus format. Raises NotFound without metrics, Forbidden for tenants."""
        with self._open("GET", "/v1/metrics", None, {}, _QUICK) as response:
            return read_text(response)

    @contextlib.contextmanager
    def forward(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str], timeout: float,
        watching: Callable[[socket.socket], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
    ) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
        """For a proxy: yields the response to any request, also a problem document. Raises Unreachable, TimedOut.

        ``watching`` is entered with the connected socket, and left before the connection is closed.
        """
        fields = {**headers, **({"Authorization": f"Bearer {self._token}"} if self._token else {})}
        connected = False
        with contextlib.closing(self._connect(timeout)) as connection, contextlib.ExitStack() as stack:
            try:
                connection.connect()
                connected = True
                stack.enter_context(watching(connection.sock))
                connection.request(method, target, body, fields)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise map_connection_error(self._where, error, connected=connected) from None
            yield response

    def _change(
        self, name: str, what: str, version: int | None, timeout: float, body: Mapping[str, object] | None = None
    ) -> shapes.Guest:
        changed: shapes.Guest = self._ask(shapes.Guest, "POST", f"{_path(name)}/{what}", body, timeout, _if_match(version))
        return changed

    def _ask(
        self, kind: Any, method: str, target: str, body: object = None, timeout: float = _QUICK,
        headers: Mapping[str, str] | None = None,
    ) -> Any:  # fmt: skip
        with self._open(method, target, body, headers or {}, timeout) as response:
            return read_answer(response, kind)

    @contextlib.contextmanager
    def _open(
        self, method: str, target: str, body: object, headers: Mapping[str, str], timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Yields a successful response; raises problem documents and connection errors as OrchestratorErrors."""
        timer = threading.Timer(SLOW_SECONDS, self._on_slow) if self._on_slow and timeout == _QUICK else None
        fields = dict(headers)
        if body is not None:
            fields["Content-Type"] = "application/json"
        if self._token:
            fields["Authorization"] = f"Bearer {self._token}"
        is_idempotent = method == "GET" or (isinstance(body, Mapping) and body.get("id") is not None)
        request = Request(method, target, None if body is None else json.dumps(body), fields, is_idempotent)
        connected = True  # a kept connection is
        connection: http.client.HTTPConnection | None = None
        response: http.client.HTTPResponse | None = None
        try:
            if timer:
                timer.daemon = True
                timer.start()
            connection, response = self._kept.exchange(request, timeout)
            if connection is None or response is None:
                connected = False
                connection = self._connect(timeout)
                connection.connect()
                connected = True
                response = exchange(connection, request)
            if response.status >= 300:
                raise read_problem(response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise map_connection_error(self._where, error, connected=connected) from None
        finally:
            if timer:
                timer.cancel()
            if connection and response:
                self._kept.keep(connection, response)
            elif connection:
                connection.close()

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        if isinstance(self._where, Path):
            return UnixConnection(self._where, timeout)
        return TlsConnection(self._address, self._tls, timeout)


def _path(name: str) -> str:
    return f"/v1/guests/{quote(name, safe='')}"


def _if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}
