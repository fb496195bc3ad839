"""Finds the guest of a request, and checks role and version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from orchestrator.errors import Forbidden, NotFound
from orchestrator.guests.console_watch import guest_replaced_error
from orchestrator.guests.transitions import Transitions
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.access import Identity, may_change, may_see
from orchestrator.model.guest_view import check_version
from orchestrator.model.state import GuestState


class GuestAccess:
    def __init__(self, ledger: Ledger, transitions: Transitions) -> None:
        self._ledger, self._transitions = ledger, transitions

    def find(self, caller: Identity, name: str) -> Claim:
        """Raises NotFound also for a guest that the caller may not see."""
        claim = self._ledger.find(name)
        if not claim or not may_see(caller, claim.owner):
            raise NotFound(f"no guest named {name}", "`nohype guest list` shows all guests")
        return claim

    def find_for_change(self, caller: Identity, name: str) -> Claim:
        """Raises Forbidden for a guest that the caller may only see; and as ``find``."""
        claim = self.find(caller, name)
        if not may_change(caller, claim.owner):
            raise Forbidden(f"{caller.name} may not change guest {claim.plan.name}")
        return claim

    @contextmanager
    def lock_for_change(
        self, caller: Identity, name: str, expected: int | None, *, expire_shutdown: bool = False
    ) -> Iterator[Claim]:
        """Holds the guest's lock. Raises Stale if the guest is not at the ``expected`` version; None accepts any.

        ``expire_shutdown``: a running shutdown, which holds the lock, times out now, and its version is also accepted.
        """
        # Checked before the wait for the lock, which can take an hour: a version that is gone does not come again.
        before = self.find_for_change(caller, name)
        check_version(before, expected)
        if expire_shutdown and before.state == GuestState.STOPPING:
            self._transitions.expire_shutdown(before)
        with self._transitions.guest_locks(name):
            claim = self.find(caller, name)
            if not (expire_shutdown and _was_only_stopped(before, claim)):
                check_version(claim, expected)
            if claim.plan.uuid != before.plan.uuid:
                raise guest_replaced_error(name)
            yield claim

    @contextmanager
    def lock_for_deletion(self, caller: Identity, name: str, expected: int | None) -> Iterator[Claim | None]:
        """As ``lock_for_change``, also for a guest whose disks are being prepared: that stops. None if nothing is left of it."""
        before = self.find_for_change(caller, name)
        check_version(before, expected)
        if before.state == GuestState.CREATING:
            self._transitions.stop_preparing(before)
        with ExitStack() as stack:
            claim: Claim | None = None
            try:
                claim = stack.enter_context(self.lock_for_change(caller, name, expected, expire_shutdown=True))
            except NotFound:
                if before.state != GuestState.CREATING:
                    raise
            yield claim


def _was_only_stopped(before: Claim, now: Claim) -> bool:
    """The shutdown was the only change. Versions are unique, so this is also the same guest."""
    return before.state == GuestState.STOPPING and now.state == GuestState.STOPPED and now.previous == before.version
