"""What the ledger holds, as values."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState


@dataclass(frozen=True)
class Claim:
    """A guest's claim and how far the guest has come.

    Attributes:
        request: what was asked for; the plan is the answer.
        owner: the tenant it belongs to, empty for the host's own.
        version: grows with each change of this guest; no two guests ever have the same.
        previous: the version that the last change was made of; None for a new claim, and for one as it was read from the file.
        restarts: how often it was started again after a failure, since somebody last started it; the time that it waits for too.
    """

    plan: Plan
    state: GuestState
    request: GuestRequest
    owner: str = ""
    version: int = 1
    restarts: int = 0
    previous: int | None = field(default=None, compare=False)

    @property
    def restarted(self) -> int:
        """How often it was started again, without the time that it waits for."""
        return self.restarts if self.state == GuestState.RUNNING else max(0, self.restarts - 1)


@dataclass(frozen=True)
class ClaimSnapshot:
    """All claims at one moment; ``generation`` grows with each claim."""

    generation: int
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class UndoRecord:
    """How to undo one change to the host. ``owner`` is a guest's name or "host"."""

    id: int
    owner: str
    action: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class Quarantined:
    """A guest whose things could not be verified clean.

    Attributes:
        since: UTC in ISO 8601.
        reasons: what is not clean, a sentence each.
    """

    name: str
    since: str
    reasons: tuple[str, ...]
