"""Follows the serial console of a guest over lost connections."""

from __future__ import annotations

import base64
import contextlib
import http.client
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from orchestrator.client import shapes
from orchestrator.client.answers import check_stream, parse_stream
from orchestrator.client.problems import parse_problem
from orchestrator.client.transport import Unreachable
from orchestrator.errors import LedgerError, OrchestratorError, TooMany

_PAUSE = 1.0

Open = Callable[[Mapping[str, str]], contextlib.AbstractContextManager[http.client.HTTPResponse]]


@dataclass(frozen=True)
class ConsoleOutput:
    """What the guest with this id printed. ``may_have_skipped``: output before this may be missing."""

    uuid: str
    data: bytes
    may_have_skipped: bool


def follow_console(open_stream: Open) -> Iterator[ConsoleOutput]:
    """Yields output up to the last part, and raises the problem in it; ``open_stream`` gets header fields.

    Connects again after a lost connection, except the first time.
    """
    position: str | None = None
    while True:
        pause = _PAUSE
        try:
            with open_stream({"Last-Event-ID": position} if position else {}) as response:
                check_stream(response)
                for part in parse_stream(response, shapes.ConsolePart):
                    position = part["position"]
                    yield _parse(part)
                    if part["last"]:
                        if part["problem"]:
                            raise _Ended(parse_problem(part["problem"]))
                        return
        except _Ended as ended:
            raise ended.error from None
        except (Unreachable, TooMany, LedgerError, OSError, http.client.HTTPException) as error:
            if position is None:
                raise
            if isinstance(error, TooMany):
                pause = max(pause, error.wait)
        time.sleep(pause)


class _Ended(Exception):
    """The problem in the last part, which must not be mistaken for an error of the connection."""

    def __init__(self, error: OrchestratorError) -> None:
        super().__init__()
        self.error = error


def _parse(part: shapes.ConsolePart) -> ConsoleOutput:
    try:
        return ConsoleOutput(part["uuid"], base64.b64decode(part["output"], validate=True), part["may_have_skipped"])
    except ValueError:
        raise OrchestratorError("the console stream contains invalid Base64: not a NoHype manager", "check the address") from None
