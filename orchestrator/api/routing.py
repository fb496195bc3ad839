"""Declares each operation at the function that serves it: method, path, answer, error codes and kind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response

from orchestrator.api.limits import Kind

Endpoint = Callable[..., Awaitable[Response]]
_Endpoint = TypeVar("_Endpoint", bound=Endpoint)

# Problems with the host; any operation that reads the host can fail with them.
HOST_CODES = ("host", "command", "ledger", "image", "hypervisor", "error")
CHANGE_CODES = ("cross-site", "not-found", "conflict", "lost-race", "guest", "stale", *HOST_CODES)
PLAN_CODES = ("cross-site", "not-found", "conflict", "lost-race", "no-room", "quota", *HOST_CODES)


@dataclass(frozen=True)
class Route:
    """One operation; the function's name is its operation id."""

    method: str
    path: str
    endpoint: Endpoint
    answer: Any  # a type of `shapes`; None for no content
    codes: tuple[str, ...]  # of its problems, in addition to those of every operation
    status: int  # of success
    media: str
    etag: bool  # the guest's version is the ETag of the answer
    repeatable: bool  # a repeated request gets 200 with what the first request created
    kind: Kind
    documented: bool  # in the OpenAPI document

    @property
    def name(self) -> str:
        return self.endpoint.__name__


class Routes(list[Route]):
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
