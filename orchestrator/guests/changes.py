"""Which guest a request means, whether the caller may see or change it, and in which version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import Forbidden, NotFound, Stale
from orchestrator.guests.console_watch import explain_gone
from orchestrator.guests.core_manager import CoreManager
from orchestrator.ledger import Claim, Ledger
from orchestrator.locks import Locks
from orchestrator.model.access import Identity, may_change, may_see
from orchestrator.model.state import GuestState


class Changes:
    """Finds guests for callers, and lets them be changed one change after the other.

    Args:
        locks: by a guest's name.
    """

    def __init__(self, ledger: Ledger, cores: CoreManager, locks: Locks) -> None:
        self._ledger, self._cores, self._locks = ledger, cores, locks

    def find(self, who: Identity, name: str) -> Claim:
        """A guest that the caller may see.

        Raises:
            NotFound: there is none.
        """
        claim = self._ledger.find(name)
        if not claim or not may_see(who, claim.owner):
            raise NotFound(f"there is no guest named {name}", "`nohype guest list` shows all")
        return claim

    def find_to_change(self, who: Identity, name: str) -> Claim:
        """A guest that the caller may change.

        Raises:
            NotFound: there is none.
            Forbidden: the caller may only look at it.
        """
        claim = self.find(who, name)
        if not may_change(who, claim.owner):
            raise Forbidden(f"{who.name} may look at guest {claim.plan.name}, but not change it")
        return claim

    @contextmanager
    def change(self, who: Identity, name: str, expected: int | None, *, hurry: bool = False) -> Iterator[Claim]:
        """The guest, with nobody else changing it.

        Args:
            expected: the version that the caller has seen, or None for any.
            hurry: cut short the time that a guest which is being stopped has for its power-off, as its stop has the lock. The
                version that this stop alone makes of it is then expected, too.

        Raises:
            NotFound, Forbidden: as ``find_to_change``; NotFound also if another guest has taken the name meanwhile.
            Stale: it is of another version.
        """
        # At once: a version never comes again, and another's change may take an hour.
        before = self.find_to_change(who, name)
        check_version(before, expected)
        if hurry and before.state == GuestState.STOPPING:
            self._cores.hurry(before.plan)
        with self._locks(name):
            claim = self.find(who, name)
            if not (hurry and _was_stopped(before, claim)):
                check_version(claim, expected)
            if claim.plan.uuid != before.plan.uuid:
                raise explain_gone(name)
            yield claim


def check_version(claim: Claim, expected: int | None) -> None:
    """Whether a guest is of the expected version.

    Raises:
        Stale: it is not.
    """
    if expected is not None and expected != claim.version:
        what = f"guest {claim.plan.name} has changed: it is version {claim.version}, not {expected}"
        raise Stale(what, "look at it again")


def _was_stopped(before: Claim, now: Claim) -> bool:
    """Whether the stop that was under way before is all that has happened to the guest. No two versions are the same number, so
    this is the same guest too.
    """
    return before.state == GuestState.STOPPING and now.state == GuestState.STOPPED and now.previous == before.version
