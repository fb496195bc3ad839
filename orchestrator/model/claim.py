"""The ledger's values."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.model.disengagement import Disengagement
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState


@dataclass(frozen=True)
class Claim:
    """A guest's claim and state.

    Attributes:
        plan: while the guest's disks are wiped, and afterwards, only they are left in it.
        previous: the version before the last change; None for a new claim, or one that was read from the file.
    """

    plan: Plan
    state: GuestState
    request: GuestRequest
    owner: str = ""  # the tenant, empty for the host's own guests
    version: int = 1  # grows with each change of this guest; unique among all guests
    restarts: int = 0  # restarts after a failure since the last requested start, including a scheduled one
    host_key: str = ""  # SSH host key that the guest has reported since its last start, `ssh-ed25519 BASE64`
    disengaged: Disengagement | None = None  # the end of its boot since its last start
    created: str = ""  # when the guest was created: UTC in ISO 8601, empty if not known
    creator: str = ""  # the caller who has created it, empty if not known
    previous: int | None = field(default=None, compare=False)

    @property
    def restarted(self) -> int:
        """Restarts after a failure, without a scheduled one."""
        return self.restarts if self.state == GuestState.RUNNING else max(0, self.restarts - 1)


@dataclass(frozen=True)
class ClaimSnapshot:
    """All claims at one moment; ``generation`` grows with each claim."""

    generation: int
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class UndoRecord:
    """How to undo one change. ``owner`` is a guest's name or "host"."""

    id: int
    owner: str
    action: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class Quarantined:
    """``since`` is UTC in ISO 8601; ``reasons`` has one sentence per finding."""

    name: str
    since: str
    reasons: tuple[str, ...]
