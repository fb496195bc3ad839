"""The typed client of the manager's interface, over its Unix socket. Standard library only: `nohype` must start quickly."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from orchestrator.api.problems import parse_problem
from orchestrator.errors import OrchestratorError

_QUICK = 120.0
_MARGIN = 30.0


class Client:
    """Talks to `nohyped`.

    Args:
        path: the manager's Unix socket.

    All methods raise OrchestratorError with the manager's own words, or with what to do if it can't be reached.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def survey(self) -> dict[str, Any]:
        """What the host has."""
        return self._ask("GET", "/v1/survey")  # type: ignore[no-any-return]

    def guests(self) -> list[dict[str, Any]]:
        """All guests."""
        return self._ask("GET", "/v1/guests")  # type: ignore[no-any-return]

    def guest(self, name: str) -> dict[str, Any]:
        """One guest."""
        return self._ask("GET", f"/v1/guests/{quote(name, safe='')}")  # type: ignore[no-any-return]

    def plan(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a guest would get."""
        return self._ask("POST", "/v1/plans", request)  # type: ignore[no-any-return]

    def create(self, request: dict[str, Any], *, timeout: float = 600.0) -> dict[str, Any]:
        """Makes a guest; the fields are those of `GuestRequest`. Returns once it runs, before it has booted."""
        return self._ask("POST", "/v1/guests", request, timeout)  # type: ignore[no-any-return]

    def stop(self, name: str) -> None:
        """Ends a guest and gives back what it had."""
        self._ask("DELETE", f"/v1/guests/{quote(name, safe='')}", timeout=_QUICK)

    def wait_ready(self, name: str, timeout: float) -> str:
        """Waits (seconds) for the guest's word that it is ready; returns that line."""
        query = urlencode({"timeout": timeout})
        return str(self._ask("GET", f"/v1/guests/{quote(name, safe='')}/ready?{query}", timeout=timeout + _MARGIN)["line"])

    def tell(self, name: str, line: str, timeout: float) -> str:
        """Types a line on the guest's console; returns its answer."""
        body = {"line": line, "timeout": timeout}
        return str(self._ask("POST", f"/v1/guests/{quote(name, safe='')}/tell", body, timeout + _MARGIN)["answer"])

    def audit(self, frames: int) -> list[dict[str, Any]]:
        """All proofs, measured now; frames: how many to send from guest to guest for `vepa`."""
        return self._ask("GET", f"/v1/audit?{urlencode({'frames': frames})}", timeout=600.0)  # type: ignore[no-any-return]

    def _ask(self, method: str, target: str, body: object = None, timeout: float = _QUICK) -> Any:
        connection = _UnixConnection(self._path, timeout)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, target, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise OrchestratorError(
                f"the manager does not answer on {self._path}: {reason}",
                "is it running? `systemctl status nohyped`; are you root or in the group nohype?",
            ) from None
        finally:
            connection.close()
        try:
            answer = json.loads(content) if content else None
        except ValueError:
            # What a server says of a fault of its own is no JSON.
            raise OrchestratorError(
                f"the manager failed: {response.status} {response.reason}", "its log says why: `journalctl -u nohyped`"
            ) from None
        if response.status >= 300:
            raise parse_problem(answer if isinstance(answer, dict) else {})
        return answer


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
