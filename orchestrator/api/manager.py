"""The manager as the interface sees it: what it asks of `lifecycle.SystemManager`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol, cast

from orchestrator.api.identity import Directory, acts_for
from orchestrator.client import shapes
from orchestrator.model.access import MANAGER, Identity, Role
from orchestrator.model.event import Event
from orchestrator.model.request import GuestRequest
from orchestrator.model.topology import Topology


class View(Protocol):
    """A guest as the manager shows it."""

    @property
    def version(self) -> int:
        """Grows with each change of the guest."""

    def to_json(self) -> dict[str, Any]:
        """The guest as plain JSON types."""


class Quarantined(Protocol):
    """A guest in quarantine; see `ledger.Quarantined`."""

    @property
    def name(self) -> str: ...
    @property
    def since(self) -> str: ...
    @property
    def reasons(self) -> Sequence[str]: ...


class Manager(Protocol):
    """Does the work. Every method may raise OrchestratorError; a guest that ``who`` may not see is NotFound."""

    def survey(self) -> Topology: ...
    def compare(self, topology: Topology, /) -> tuple[object, ...]: ...
    def guests(self, who: Identity, /) -> Sequence[View]: ...
    def guest(self, who: Identity, name: str, /) -> View: ...
    def plan(self, who: Identity, request: GuestRequest, /) -> View: ...
    def create(self, who: Identity, request: GuestRequest, /) -> tuple[View, bool]: ...
    def start(self, who: Identity, name: str, expected: int | None = None, /) -> View: ...
    def stop(self, who: Identity, name: str, timeout: float, expected: int | None = None, /) -> View: ...
    def restart(self, who: Identity, name: str, timeout: float, expected: int | None = None, /) -> View: ...
    def kill(self, who: Identity, name: str, expected: int | None = None, /) -> View: ...
    def delete(self, who: Identity, name: str, expected: int | None = None, /) -> None: ...
    def begin_ready(self, who: Identity, name: str, timeout: float, /) -> Future[str]: ...
    def begin_tell(self, who: Identity, name: str, line: str, timeout: float, /) -> Future[str]: ...
    def quarantined(self, who: Identity, /) -> Sequence[Quarantined]: ...
    def clear_quarantine(self, who: Identity, name: str, expected: int | None = None, /, *, force: bool = False) -> None: ...
    def last_event(self) -> int: ...
    def events(self, who: Identity, after: int | None, limit: int, /) -> Sequence[Event]: ...
    def wait_events(self, who: Identity, after: int, timeout: float, /) -> Sequence[Event]: ...


def show_events(events: Sequence[Event], who: Identity, directory: Directory) -> list[shapes.Event]:
    """Events as ``who`` may see them: a tenant sees its own people's names, and of operators only that they are some."""
    shown = [cast(shapes.Event, event.to_json()) for event in events]
    if who.role is Role.TENANT:
        known = {MANAGER.name: True, who.name: True}
        for event in shown:
            name = event["who"]
            if name not in known:
                known[name] = acts_for(directory, name, who.tenant)
            if not known[name]:
                event["who"] = str(Role.OPERATOR)
    return shown


def quarantined_json(one: Quarantined) -> shapes.Quarantined:
    """A guest in quarantine as plain JSON types."""
    return {"name": one.name, "since": one.since, "reasons": list(one.reasons)}
