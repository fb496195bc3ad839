"""Restarts of guests that have ended: the decision and the timers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from uuid import UUID

from orchestrator.guests.outcome import log_errors
from orchestrator.hypervisor.connection import EndCause
from orchestrator.ledger import Claim
from orchestrator.model.request import Restart

RESTARTABLE_CAUSES = (EndCause.FAILED, EndCause.RESET, EndCause.UNKNOWN)
"""A reset is a panic or a reboot."""
STABLE_RUN_SECONDS = 600.0
"""After a run of this length a failure counts as the first one."""
MAX_RESTARTS = 10
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 300.0


def delay(restarts: int) -> float | None:
    """Seconds before the next restart, after this number of restarts since the last requested start; None to give up."""
    return None if restarts >= MAX_RESTARTS else min(_FIRST_DELAY * 2**restarts, _LONGEST_DELAY)


def count_restarts(claim: Claim, cause: EndCause, ran: float | None) -> int:
    """The number of the restart that follows this end, 0 without a restart. ``ran``: seconds, None if not known."""
    if cause not in RESTARTABLE_CAUSES or claim.request.restart is not Restart.ON_FAILURE:
        return 0
    return 1 if ran is None or ran >= STABLE_RUN_SECONDS else claim.restarts + 1


class NamedTimers:
    """At most one timer per name. The caller of a method that takes a name holds that name's lock."""

    def __init__(self) -> None:
        self._timers: dict[str, threading.Timer] = {}
        self._closed = False

    def set(self, name: str, seconds: float, work: Callable[[threading.Timer], object]) -> None:
        self.cancel(name)
        if self._closed:
            return
        timer = threading.Timer(seconds, lambda: work(timer))
        timer.daemon = True
        self._timers[name] = timer
        timer.start()

    def pop_if_current(self, name: str, timer: threading.Timer) -> bool:
        """Removes the timer; False if it was cancelled or replaced while its ``work`` waited for the lock."""
        if self._closed or self._timers.get(name) is not timer:
            return False
        del self._timers[name]
        return True

    def cancel(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def get(self, name: str) -> threading.Timer | None:
        return self._timers.get(name)

    def close(self) -> None:
        self._closed = True
        for timer in list(self._timers.values()):
            timer.cancel()


class Restarts:
    """Scheduled restarts, and how long guests have run. The caller of a method holds the guest's lock.

    ``run`` restarts the guest of a name; it passes the timer to ``begin``.
    """

    def __init__(self, run: Callable[[str, threading.Timer], object]) -> None:
        self._run = run
        self._timers = NamedTimers()
        self._running_since: dict[UUID, float] = {}

    def note_start(self, claim: Claim) -> None:
        self._running_since[claim.plan.uuid] = time.monotonic()

    def count_after(self, claim: Claim, cause: EndCause) -> int:
        since = self._running_since.pop(claim.plan.uuid, None)
        return count_restarts(claim, cause, None if since is None else time.monotonic() - since)

    def schedule(self, claim: Claim) -> bool:
        """Restarts the guest after a delay; False if it has failed too often. ``claim.restarts`` counts this restart."""
        name, seconds = claim.plan.name, delay(claim.restarts - 1)
        if seconds is None:
            return False
        self._timers.set(name, seconds, lambda timer: log_errors(lambda: self._run(name, timer)))
        return True

    def begin(self, name: str, timer: threading.Timer) -> bool:
        """Takes the restart off the schedule; False if it was cancelled."""
        return self._timers.pop_if_current(name, timer)

    def cancel(self, name: str) -> None:
        self._timers.cancel(name)

    def forget(self, claim: Claim) -> None:
        self._timers.cancel(claim.plan.name)
        self._running_since.pop(claim.plan.uuid, None)

    def pending(self, name: str) -> threading.Timer | None:
        """The timer of a scheduled restart; calling its ``function`` restarts the guest immediately."""
        return self._timers.get(name)

    def close(self) -> None:
        self._timers.close()
