"""The typed client of the manager's interface, over its Unix socket or its TLS port. Standard library only: `nohype` must start
quickly.

    client = Client(Path("/run/nohype/nohyped.sock"))
    guest = client.create({"name": "web", "memory": "1G", "image": "minimal", "id": "order-17"})
    client.stop("web", version=guest["version"])  # raises Stale if somebody has changed it since
    for event in client.follow():
        print(event["kind"], event["subject"])

All answers are plain JSON types, described in `shapes`. Every method raises an OrchestratorError of the class that the manager's
code stands for (`Unauthorized`, `Forbidden`, `TooMany`, ... may come from any), or one that says what to do if the manager can't
be reached.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from orchestrator.client import shapes
from orchestrator.client.answers import check_stream, parse_stream, read_answer, read_problem, read_text
from orchestrator.client.transport import TlsConnection, UnixConnection, Unreachable, build_context, explain, is_alert, parse_url
from orchestrator.errors import LedgerError, RequestError, TooMany

_QUICK = 120.0
_SLOW = 10.0
_MARGIN = 30.0
_AUDIT = 600.0
# Three of the heartbeats that the manager sends.
_SILENCE = 45.0
_PAUSE = 1.0
# What a header field can hold, without spaces (RFC 9110 5.5). Whether it is a token the manager says.
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Client:
    """Talks to `nohyped`. May be used by several threads: each request has a connection of its own.

    Args:
        where: the manager's Unix socket, or the address of its TLS port (``https://host:8443``).
        token: for the TLS port, in place of a client certificate.
        ca: PEM file with the CA of the manager's certificate; None for those of the system.
        certificate: PEM file with the client certificate (and, if ``key`` is None, its key).
        key: PEM file with the key of the client certificate, without a pass phrase.
        slow: called from another thread when something that should be quick has not been answered for 10 s.

    Raises:
        RequestError: the address is no https URL, the token can't be one, or a file can't be used.
    """

    def __init__(
        self,
        where: Path | str,
        *,
        token: str | None = None,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        slow: Callable[[], object] | None = None,
    ) -> None:
        if token and not _TOKEN.fullmatch(token):
            # It is not shown: it may be nearly right.
            raise RequestError("the token has signs that no token has", "it is one word, as `nohype token new` printed it")
        self._where, self._token, self._slow = where, token, slow
        if isinstance(where, str):
            self._address, self._tls = parse_url(where), build_context(ca, certificate, key)

    def version(self) -> str:
        """The manager's version."""
        return str(self._ask(shapes.Version, "GET", "/v1/version")["version"])

    def survey(self) -> shapes.Survey:
        """What the host has. Raises Forbidden for tenants."""
        found: shapes.Survey = self._ask(shapes.Survey, "GET", "/v1/survey")
        return found

    def guests(self) -> list[shapes.Guest]:
        """All guests that the caller may see."""
        found: list[shapes.Guest] = self._ask(list[shapes.Guest], "GET", "/v1/guests")
        return found

    def guest(self, name: str) -> shapes.Guest:
        """One guest. Raises NotFound if there is none, or it is another tenant's."""
        found: shapes.Guest = self._ask(shapes.Guest, "GET", _path(name))
        return found

    def plan(self, request: Mapping[str, object]) -> shapes.Guest:
        """What a guest would get; the fields are those of `GuestRequest`. Claims nothing.

        Raises:
            RequestError: a field is wrong.
            NotFound: there is no such image.
            Conflict: the name is taken.
            NoRoom, QuotaExceeded: ``reasons`` says why each candidate was refused.
        """
        planned: shapes.Guest = self._ask(shapes.Guest, "POST", "/v1/plans", request)
        return planned

    def create(self, request: Mapping[str, object], *, timeout: float = 600.0) -> shapes.Guest:
        """Makes a guest; the fields are those of `GuestRequest`. Returns once it runs, before it has booted.

        With an ``id`` it may be asked again after a lost connection: the same id and fields make one guest only.

        Raises:
            RequestError, NotFound, Conflict, NoRoom, QuotaExceeded: as ``plan``.
            HostError, HypervisorError, GuestError: it could not be started; all is as before.
        """
        made: shapes.Guest = self._ask(shapes.Guest, "POST", "/v1/guests", request, timeout)
        return made

    def start(self, name: str, *, version: int | None = None, timeout: float = 600.0) -> shapes.Guest:
        """Starts a guest that is stopped.

        Args:
            version: that of the guest as the caller has seen it; None starts it whatever has happened since.

        Raises:
            NotFound: see ``guest``.
            Conflict: it is in another state.
            Stale: it has another version by now.
            HostError, HypervisorError, GuestError: it could not be started.
        """
        return self._change(name, "start", version, timeout)

    def stop(self, name: str, timeout: float = 60.0, *, version: int | None = None) -> shapes.Guest:
        """Asks a guest to shut down, and ends it the hard way after ``timeout`` seconds. It keeps what it owns.

        Raises:
            NotFound, Conflict, Stale: as ``start``.
        """
        return self._change(name, "stop", version, timeout + _QUICK, {"timeout": timeout})

    def restart(self, name: str, timeout: float = 60.0, *, version: int | None = None) -> shapes.Guest:
        """Stops a guest as ``stop`` does, and starts it again. Raises what those raise."""
        return self._change(name, "restart", version, timeout + _AUDIT, {"timeout": timeout})

    def kill(self, name: str, *, version: int | None = None) -> shapes.Guest:
        """Ends a guest at once, as pulling the plug does. It keeps what it owns. Raises as ``stop`` does."""
        return self._change(name, "kill", version, _QUICK)

    def delete(self, name: str, *, version: int | None = None) -> None:
        """Ends a guest at once if it runs, and gives back what it had. Raises as ``stop`` does."""
        self._ask(None, "DELETE", _path(name), timeout=_QUICK, headers=_if_match(version))

    def wait_ready(self, name: str, timeout: float) -> str:
        """Waits (seconds) for the guest's word that it is ready; returns that line. Raises NotFound, GuestError."""
        query = urlencode({"timeout": timeout})
        return str(self._ask(shapes.Ready, "GET", f"{_path(name)}/ready?{query}", timeout=timeout + _MARGIN)["line"])

    def send_command(self, name: str, line: str, timeout: float) -> str:
        """Sends a line to the guest's console; returns the reply, for which it waits ``timeout`` seconds.

        Raises:
            NotFound, GuestError.
        """
        body = {"line": line, "timeout": timeout}
        return str(self._ask(shapes.Answer, "POST", f"{_path(name)}/tell", body, timeout + _MARGIN)["answer"])

    def quarantined(self) -> list[shapes.Quarantined]:
        """The guests whose things could not be verified clean. Raises Forbidden for tenants."""
        found: list[shapes.Quarantined] = self._ask(list[shapes.Quarantined], "GET", "/v1/quarantine")
        return found

    def clear_quarantine(self, name: str, *, force: bool = False) -> None:
        """Gives what a guest in quarantine had to whoever asks next, if it can now be verified clean.

        Args:
            force: even if it can't.

        Raises:
            Forbidden: the caller is no operator.
            NotFound: no such guest is in quarantine.
            Conflict: it is still not clean.
        """
        self._ask(None, "DELETE", f"/v1/quarantine/{quote(name, safe='')}?{urlencode({'force': str(force).lower()})}")

    def audit(self, frames: int) -> list[shapes.Proof]:
        """All proofs, measured now. Raises Forbidden for tenants.

        Args:
            frames: how many to send from guest to guest for `vepa`; only operators may ask for more than 0.
        """
        proofs: list[shapes.Proof] = self._ask(list[shapes.Proof], "GET", f"/v1/audit?frames={frames:d}", timeout=_AUDIT)
        return proofs

    def events(self, after: int | None = None, limit: int = 1000) -> list[shapes.Event]:
        """Up to ``limit`` events with ids above ``after``, oldest first; None for the newest. Only those the caller may see."""
        query = {"limit": limit} if after is None else {"limit": limit, "after": after}
        found: list[shapes.Event] = self._ask(list[shapes.Event], "GET", f"/v1/events?{urlencode(query)}")
        return found

    def follow(self, after: int | None = None) -> Iterator[shapes.Event]:
        """Events as they happen, without end; after a lost connection it goes on where it was. When the manager is too busy, or
        can't read its ledger, it tries again.

        Args:
            after: id of the event after which to begin; None for those from now on.

        Raises:
            OrchestratorError: the manager can't be reached at the beginning, or refuses.
        """
        if after is None:
            # Asked for, so that nothing is missed if the connection is lost before the first event.
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

    def metrics(self) -> str:
        """What Prometheus reads. Raises NotFound without metrics, Forbidden for tenants."""
        with self._open("GET", "/v1/metrics", None, {}, _QUICK) as response:
            return read_text(response)

    def _change(
        self, name: str, what: str, version: int | None, timeout: float, body: Mapping[str, object] | None = None
    ) -> shapes.Guest:
        changed: shapes.Guest = self._ask(shapes.Guest, "POST", f"{_path(name)}/{what}", body, timeout, _if_match(version))
        return changed

    def _ask(
        self, kind: Any, method: str, target: str, body: object = None, timeout: float = _QUICK,
        headers: Mapping[str, str] | None = None,
    ) -> Any:  # fmt: skip
        """The answer, which must be of a type of `shapes`; None: without content."""
        with self._open(method, target, body, headers or {}, timeout) as response:
            return read_answer(response, kind)

    @contextlib.contextmanager
    def _open(
        self, method: str, target: str, body: object, headers: Mapping[str, str], timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, if it is a good one. Other errors of the connection are explained here."""
        connection = self._connect(timeout)
        timer = threading.Timer(_SLOW, self._slow) if self._slow and timeout == _QUICK else None
        fields = dict(headers)
        if body is not None:
            fields["Content-Type"] = "application/json"
        if self._token:
            fields["Authorization"] = f"Bearer {self._token}"
        connected = False
        try:
            if timer:
                timer.daemon = True
                timer.start()
            connection.connect()
            connected = True
            response = _exchange(connection, method, target, None if body is None else json.dumps(body), fields)
            if response.status >= 300:
                raise read_problem(response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise explain(self._where, error, connected=connected) from None
        finally:
            if timer:
                timer.cancel()
            connection.close()

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        if isinstance(self._where, Path):
            return UnixConnection(self._where, timeout)
        return TlsConnection(self._address, self._tls, timeout)


def _exchange(
    connection: http.client.HTTPConnection, method: str, target: str, body: str | None, fields: Mapping[str, str]
) -> http.client.HTTPResponse:
    """Sends a request on a connection, and returns the head of the answer.

    Who refuses before all is read closes the connection: writing fails then, and what was said before that is still to be read.
    It is an answer, or TLS's alert: since TLS 1.3 a client certificate is refused after the client's handshake is over.
    """
    failed: OSError | None = None
    try:
        connection.request(method, target, body, dict(fields))
    except (BrokenPipeError, ConnectionResetError, ssl.SSLError) as error:
        failed = error
    try:
        return connection.getresponse()
    except ssl.SSLError as error:
        raise (error if failed is None or is_alert(error) else failed) from None
    except (OSError, http.client.HTTPException):
        if failed is None:
            raise
        raise failed from None


def _path(name: str) -> str:
    return f"/v1/guests/{quote(name, safe='')}"


def _if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}
