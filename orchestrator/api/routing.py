"""Declarations of the interface's operations: method, path, answer, error codes and kind stand at the function that serves it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response

from orchestrator.api.limits import Kind

Endpoint = Callable[..., Awaitable[Response]]
_Endpoint = TypeVar("_Endpoint", bound=Endpoint)

HOST_CODES = ("host", "command", "ledger", "image", "hypervisor", "error")
"""Codes of problems with the host; any operation that reads it can fail with them."""
CHANGE_CODES = ("cross-site", "not-found", "conflict", "lost-race", "guest", "stale", *HOST_CODES)
PLAN_CODES = ("cross-site", "not-found", "conflict", "lost-race", "no-room", "quota", *HOST_CODES)


@dataclass(frozen=True)
class Route:
    """One operation; the function's name is its operation id.

    Attributes:
        answer: type of the answer, as in `shapes`; None for no content.
        codes: codes of the problems that it can answer with, in addition to those that any operation can.
        status: of success.
        media: content type of the answer.
        etag: whether the answer has the guest's version as its ETag.
        repeatable: whether a repeated request answers 200 with what the first one created.
        kind: in which of the client's places a request is counted.
        documented: whether the OpenAPI document has it.
    """

    method: str
    path: str
    endpoint: Endpoint
    answer: Any
    codes: tuple[str, ...]
    status: int
    media: str
    etag: bool
    repeatable: bool
    kind: Kind
    documented: bool

    @property
    def name(self) -> str:
        """The operation id."""
        return self.endpoint.__name__


class Routes(list[Route]):
    """The operations of one noun, in the order of their declaration."""

    def add(
        self, method: str, path: str, answer: Any, codes: tuple[str, ...] = (), *,
        status: int = 200, media: str = "application/json", etag: bool = False, repeatable: bool = False,
        kind: Kind = Kind.OTHER, documented: bool = True,
    ) -> Callable[[_Endpoint], _Endpoint]:  # fmt: skip
        """Declares the decorated function as an operation; the arguments are the attributes of ``Route``."""

        def declare(endpoint: _Endpoint) -> _Endpoint:
            self.append(Route(method, path, endpoint, answer, codes, status, media, etag, repeatable, kind, documented))
            return endpoint

        return declare
