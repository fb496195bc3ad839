"""A guest as the manager shows it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from orchestrator.errors import Stale
from orchestrator.model.claim import Claim
from orchestrator.model.disengagement import Disengagement
from orchestrator.model.disk import DiskProgress
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState


@dataclass(frozen=True)
class GuestView:
    """``owner``: the tenant, empty for the host's own guests. ``version``: as of ``Claim``; 0 without a claim."""

    plan: Plan
    state: str  # as in the ledger; ``ended`` if it does not run but should; ``planned`` without a claim
    request: GuestRequest
    owner: str = ""
    version: int = 0
    restarts: int = 0
    host_key: str = ""  # SSH host key that the running guest has reported
    disengaged: Disengagement | None = None  # the end of the running guest's boot
    created: str = ""  # as of ``Claim``
    creator: str = ""
    progress: DiskProgress | None = None  # the work on its disks while they are prepared or wiped
    warnings: tuple[str, ...] = ()  # of a plan: `last_choices`, and differences between configuration and host


def view_guest(claim: Claim, running: frozenset[UUID], progress: DiskProgress | None = None) -> GuestView:
    """``running`` are the ids of running domains."""
    ended = claim.state == GuestState.RUNNING and claim.plan.uuid not in running
    state = "ended" if ended else str(claim.state)
    host_key, end = (claim.host_key, claim.disengaged) if claim.plan.uuid in running else ("", None)
    return GuestView(
        claim.plan, state, claim.request, claim.owner, claim.version, claim.restarted, host_key, end, claim.created,
        claim.creator, progress,
    )  # fmt: skip


def view_running(claim: Claim) -> GuestView:
    """A guest that was just started."""
    return view_guest(claim, frozenset({claim.plan.uuid}))


def check_version(claim: Claim, expected: int | None) -> None:
    """Raises Stale if the guest has another version; None accepts any."""
    if expected is not None and expected != claim.version:
        message = f"guest {claim.plan.name} is at version {claim.version}, expected {expected}"
        raise Stale(message, "read the guest again, then retry with its version")
