"""Declares each operation at the function that serves it: method, path, answer, error codes and kind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
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


class RouteTable:
    """Finds the operation of a request. A path has at most a parameter per segment: ``/v1/guests/{name}/stop``."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._by_path: dict[tuple[str | None, ...], dict[str, tuple[Route, tuple[str, ...]]]] = {}
        # Segments that are parameters, by the number of segments; a path without parameters is looked up first.
        self._places: dict[int, list[tuple[int, ...]]] = {}
        for route in routes:
            segments = route.path.split("/")
            places = tuple(place for place, segment in enumerate(segments) if segment.startswith("{"))
            names = tuple(segments[place][1:-1] for place in places)
            self._by_path.setdefault(_blank(segments, places), {})[route.method] = route, names
            known = self._places.setdefault(len(segments), [])
            known[:] = sorted({*known, places})

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """With the values of the path's parameters. HEAD counts as GET."""
        segments = path.split("/")
        for places, methods in self._match(segments):
            if found := methods.get("GET" if method == "HEAD" else method):
                route, names = found
                return route, dict(zip(names, (segments[place] for place in places), strict=True))
        return None

    def find_kind(self, method: str, path: str) -> Kind:
        """Before the body of the request is read."""
        found = self.find(method, path)
        return found[0].kind if found else Kind.OTHER

    def methods(self, path: str) -> frozenset[str]:
        """All methods of a path; empty if no operation has it."""
        found = frozenset(method for _, methods in self._match(path.split("/")) for method in methods)
        return found | {"HEAD"} if "GET" in found else found

    def _match(self, segments: list[str]) -> list[tuple[tuple[int, ...], dict[str, tuple[Route, tuple[str, ...]]]]]:
        """The methods of each path of this form."""
        known = ((places, self._by_path.get(_blank(segments, places))) for places in self._places.get(len(segments), ()))
        return [(places, methods) for places, methods in known if methods and all(segments[place] for place in places)]


def _blank(segments: list[str], places: tuple[int, ...]) -> tuple[str | None, ...]:
    """The segments with None for each parameter, which no segment of a path can be."""
    return tuple(None if place in places else segment for place, segment in enumerate(segments))
