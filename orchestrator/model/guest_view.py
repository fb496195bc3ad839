"""A guest as the manager shows it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from orchestrator.errors import Stale
from orchestrator.model.claim import Claim
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState


@dataclass(frozen=True)
class GuestView:
    """A guest as the manager shows it.

    Attributes:
        state: as in the ledger; ``ended`` if it should run but does not; ``planned`` if nothing is claimed for it.
        owner: its tenant, empty for the host's own.
        version: as of ``Claim``; 0 if nothing is claimed.
        warnings: of a plan: resources that unmanaged domains may use later, and differences between configuration and host.
    """

    plan: Plan
    state: str
    request: GuestRequest
    owner: str = ""
    version: int = 0
    restarts: int = 0
    warnings: tuple[str, ...] = ()


def view_guest(claim: Claim, running: frozenset[UUID]) -> GuestView:
    """The guest now; ``running`` are the ids of running domains."""
    ended = claim.state == GuestState.RUNNING and claim.plan.uuid not in running
    state = "ended" if ended else str(claim.state)
    return GuestView(claim.plan, state, claim.request, claim.owner, claim.version, claim.restarted)


def check_version(claim: Claim, expected: int | None) -> None:
    """Raises Stale unless the guest has the expected version; None for any."""
    if expected is not None and expected != claim.version:
        what = f"guest {claim.plan.name} has changed: it is version {claim.version}, not {expected}"
        raise Stale(what, "look at it again")
