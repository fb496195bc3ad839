"""Changes the state of guests: start, stop, delete, quarantine, release, restart. No other module writes a guest's state."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from uuid import UUID

from orchestrator.errors import Conflict, HostError, OrchestratorError
from orchestrator.guests.core_manager import CoreContext, CoreManager
from orchestrator.guests.disk_work import CountWipe, Wiper, ignore_wipe
from orchestrator.guests.outcome import Outcome, log_errors, log_event
from orchestrator.guests.recovery import decide
from orchestrator.guests.restarts import MAX_RESTARTS, RESTARTABLE_CAUSES, Restarts
from orchestrator.hypervisor.connection import EndCause
from orchestrator.ledger import Claim, EventKind
from orchestrator.locks import NamedLocks
from orchestrator.model.access import MANAGER
from orchestrator.model.state import GuestState
from orchestrator.values import CpuSet


class Transitions:
    """The caller of a method that takes a claim holds the guest's lock: ``guest_locks(name)``.

    ``count_undo_failure`` is called if a cleanup is not verified; it must not raise.
    """

    def __init__(
        self, context: CoreContext, count_undo_failure: Callable[[], object], count_wipe: CountWipe = ignore_wipe
    ) -> None:
        self.guest_locks = NamedLocks()
        self.restarts = Restarts(self._run_restart)
        self._context, self._ledger = context, context.ledger
        self._wiper = Wiper(context.disk_work, lambda claim: self.core_manager(claim).wipe(), self._finish_wiping)
        self._count_undo_failure, self._count_wipe = count_undo_failure, count_wipe
        # Guests whose shutdown in another thread times out now.
        self._expired_shutdowns: set[UUID] = set()

    def close(self) -> None:
        self._context.disk_work.close()
        self.restarts.close()
        self._wiper.close()

    def list_running(self) -> frozenset[UUID]:
        return self._context.hypervisor.running_uuids()

    def core_manager(self, claim: Claim) -> CoreManager:
        return CoreManager(self._context, claim)

    def start(self, claim: Claim, caller: str) -> Claim:
        """No-op if the guest runs. Raises Conflict, and quarantines it, if it was started outside the manager."""
        name, running = claim.plan.name, self.core_manager(claim).is_running
        if claim.state == GuestState.RUNNING:
            if running:
                return claim
            claim = self.stop(claim, caller, 0)  # the guest's end was not reported yet
        elif claim.state == GuestState.STOPPED and running:
            self.quarantine_unexpected(claim)
            raise Conflict(f"guest {name} was started outside the manager; it keeps running and is quarantined")
        self.restarts.cancel(name)
        return self.launch(self._ledger.set_state(name, GuestState.STARTING, restarts=0), caller)

    def launch(self, claim: Claim, caller: str, changed: tuple[str, ...] = ()) -> Claim:
        """Launches a CREATING or STARTING guest. A failure is undone: a STARTING guest is STOPPED, a CREATING one released.

        ``changed`` lists earlier changes to the host for this guest.
        """
        name, started_at = claim.plan.name, time.monotonic()
        self._expired_shutdowns.discard(claim.plan.uuid)
        try:
            changed = (*changed, *self.core_manager(claim).launch(first=claim.state == GuestState.CREATING))
            now = self._ledger.set_state(name, GuestState.RUNNING)
        except BaseException as error:
            cause = error.message if isinstance(error, OrchestratorError) else repr(error)
            # First: the cleanup may be interrupted, and its cause would be unknown.
            log_event(self._ledger, claim, Outcome(EventKind.FAILED, cause, caller, started_at))
            log_errors(lambda: self._undo_launch(claim, caller))
            raise
        self.restarts.note_start(now)
        detail = "; ".join((f"on CPUs {CpuSet.of(claim.plan.cpus)}", *changed))
        log_event(self._ledger, now, Outcome(EventKind.STARTED, detail, caller, started_at))
        return now

    def adopt(self, claim: Claim, state: GuestState, outcome: Outcome) -> None:
        """Confines and resumes a running domain. Writes the state last, so that an interrupted adoption is repeated."""
        self.core_manager(claim).confine_and_resume()
        log_event(self._ledger, self._ledger.set_state(claim.plan.name, state), outcome)

    def stop(self, claim: Claim, caller: str, timeout: float) -> Claim:
        """Shuts a guest down, forces it off after ``timeout`` seconds, and cleans up. Keeps its claim."""
        name, started_at, core = claim.plan.name, time.monotonic(), self.core_manager(claim)
        self.restarts.cancel(name)
        claim = self._ledger.set_state(name, GuestState.STOPPING, restarts=0)
        if not core.is_running:
            detail = "had ended already"
        elif not timeout:
            detail = "forced off"
        elif core.shut_down(timeout, lambda: claim.plan.uuid in self._expired_shutdowns):
            detail = "powered off"
        else:  # earlier than requested, if the shutdown was expired
            seconds = round(min(timeout, time.monotonic() - started_at), 1)
            detail = f"forced off after {seconds:g} s without power-off"
        return self.finish_stopping(claim, Outcome(EventKind.STOPPED, detail, caller, started_at))

    def expire_shutdown(self, claim: Claim) -> None:
        """Makes a shutdown in another thread time out now. Needs no lock."""
        self._expired_shutdowns.add(claim.plan.uuid)

    def stop_preparing(self, claim: Claim) -> None:
        """Makes the creation of the guest fail if it works on the guest's disks in another thread. Needs no lock."""
        self._context.disk_work.stop_preparing(claim.plan.uuid)

    def finish_stopping(self, claim: Claim, outcome: Outcome) -> Claim:
        """Cleans up a STOPPING guest; returns it STOPPED or QUARANTINED."""
        if findings := self._clean_up(claim):
            return self._quarantine_unclean(claim, findings, outcome.caller)
        now = self._ledger.set_state(claim.plan.name, GuestState.STOPPED)
        log_event(self._ledger, now, outcome)
        return now

    def cancel_restart(self, claim: Claim, caller: str) -> Claim:
        """Cancels the restart of a STOPPED guest, also for a later manager."""
        self.restarts.cancel(claim.plan.name)
        if claim.restarts:
            claim = self._ledger.set_state(claim.plan.name, GuestState.STOPPED, restarts=0)
            detail = "had already ended; scheduled restart cancelled"
            log_event(self._ledger, claim, Outcome(EventKind.STOPPED, detail, caller))
        return claim

    def delete(self, claim: Claim, outcome: Outcome) -> tuple[str, ...]:
        """Forces a guest off, cleans up and releases its claim. Returns findings, with which it is QUARANTINED instead.

        A guest with disks is WIPING when this returns; a thread wipes the disks and releases the claim.
        """
        claim = self._ledger.set_state(claim.plan.name, GuestState.DELETING)
        self.restarts.cancel(claim.plan.name)
        findings, wipe = self._clean_up(claim), False
        # A guest that is wiped or quarantined for days is not started again. `_release` repeats this, and raises.
        log_errors(lambda: self._context.secrets.remove(claim.plan.uuid))
        if claim.plan.disks and not findings:
            core = self.core_manager(claim)
            wipe = core.must_wipe
            findings = () if wipe else _find_unreleased(core)
        if findings:
            self._quarantine_unclean(claim, findings, outcome.caller)
        elif wipe:
            self._begin_wiping(claim, outcome)
        else:
            self._release(claim, outcome)
        return findings

    def clear(self, claim: Claim, caller: str, *, force: bool) -> tuple[str, ...]:
        """As ``delete``, for a QUARANTINED guest; with ``force`` the claim is released even if the cleanup is not verified."""
        # Before the state: if this fails, a running guest in the state DELETING would be adopted.
        self._context.hypervisor.destroy(claim.plan.uuid)
        if not force:
            return self.delete(claim, Outcome(EventKind.CLEARED, "verified clean", caller))
        claim = self._ledger.set_state(claim.plan.name, GuestState.DELETING)
        self._clean_up(claim)
        self.core_manager(claim).drop_undo_records()
        self._release(claim, Outcome(EventKind.CLEARED, "by force", caller))
        return ()

    def resume_wiping(self, claim: Claim) -> bool:
        """False if a thread is wiping the guest's disks already."""
        return self._wiper.begin(claim)

    def quarantine_unexpected(self, claim: Claim) -> None:
        """For a guest that runs although it must not. It keeps running."""
        self._quarantine(claim, (decide(claim.state, running=True).why,), MANAGER.name)

    def finish_interrupted_stop(self, claim: Claim, detail: str) -> None:
        """Completes a stop, and restarts the guest if its end had scheduled a restart."""
        now = self.finish_stopping(claim, Outcome(EventKind.ENDED, detail))
        if now.state == GuestState.STOPPED and now.restarts:
            self.schedule_restart(now)

    def handle_unrequested_end(self, claim: Claim, cause: EndCause) -> None:
        """Cleans up after a RUNNING guest that has ended; then deletes it, keeps it, or schedules its restart."""
        if claim.request.remove and cause not in RESTARTABLE_CAUSES:
            self.delete(claim, Outcome(EventKind.ENDED, f"{cause}; deleted (--remove)"))
            return
        # Stored before the cleanup, which may be interrupted.
        restarts = self.restarts.count_after(claim, cause)
        claim = self._ledger.set_state(claim.plan.name, GuestState.STOPPING, restarts=restarts)
        self.finish_interrupted_stop(claim, str(cause))

    def schedule_restart(self, claim: Claim) -> None:
        """Reports that the manager gives up after too many failures."""
        if not self.restarts.schedule(claim):
            log_event(self._ledger, claim, Outcome(EventKind.GAVE_UP, f"not restarted after {MAX_RESTARTS} failed restarts"))

    def _undo_launch(self, claim: Claim, caller: str) -> None:
        if claim.state == GuestState.CREATING:
            self.delete(claim, Outcome(None, caller=caller))
        else:
            # Counted only for a restart, which is repeated. After a requested start the caller has the error.
            restarts = claim.restarts + 1 if claim.restarts else 0
            claim = self._ledger.set_state(claim.plan.name, GuestState.STOPPING, restarts=restarts)
            self.finish_stopping(claim, Outcome(None, caller=caller))

    def _clean_up(self, claim: Claim) -> tuple[str, ...]:
        findings = self.core_manager(claim).clean_up()
        if claim.plan.software_nics:
            log_errors(self._context.setup.count_returns)  # without this guest
        self._expired_shutdowns.discard(claim.plan.uuid)
        self._context.disk_work.forget(claim.plan.uuid)
        return findings

    def _begin_wiping(self, claim: Claim, outcome: Outcome) -> None:
        claim = self._ledger.keep_disks(claim.plan.name)
        self.restarts.forget(claim)
        disks = ", ".join(disk.key for disk in claim.plan.disks)
        detail = "; ".join(filter(None, (outcome.detail, f"wiping {disks}")))
        log_event(self._ledger, claim, Outcome(EventKind.WIPING, detail, outcome.caller, outcome.started_at))
        self._wiper.begin(claim)
        self._context.setup.release()

    def _finish_wiping(self, wiped: Claim, findings: tuple[str, ...]) -> None:
        """Called in the thread that has wiped the disks."""
        name = wiped.plan.name
        with self.guest_locks(name):
            claim = self._ledger.find(name)
            if not claim or claim.plan.uuid != wiped.plan.uuid or claim.state != GuestState.WIPING:
                return
            self._count_wipe(sum(disk.size.bytes for disk in claim.plan.disks), is_clean=not findings)
            if findings:
                self._quarantine_unclean(claim, findings, MANAGER.name)
            else:
                disks = ", ".join(disk.key for disk in claim.plan.disks)
                self._release(claim, Outcome(EventKind.DELETED, f"verified clean: {disks}"))

    def _release(self, claim: Claim, outcome: Outcome) -> None:
        self._context.secrets.remove(claim.plan.uuid)  # first: a file without a claim would stay
        self._ledger.release(claim.plan.name)
        self.restarts.forget(claim)
        log_event(self._ledger, claim, outcome)
        self._context.setup.release()

    def _quarantine_unclean(self, claim: Claim, findings: tuple[str, ...], caller: str) -> Claim:
        self._count_undo_failure()
        return self._quarantine(claim, findings, caller)

    def _quarantine(self, claim: Claim, findings: tuple[str, ...], caller: str) -> Claim:
        self._ledger.quarantine(claim.plan.name, findings)
        log_event(self._ledger, claim, Outcome(EventKind.QUARANTINED, "; ".join(findings), caller))
        return self._ledger.find(claim.plan.name) or claim  # the claim exists: the guest's lock is held

    def _run_restart(self, name: str, timer: threading.Timer) -> None:
        with self.guest_locks(name):
            claim = self._ledger.find(name) if self.restarts.begin(name, timer) else None
            if not claim or claim.state != GuestState.STOPPED or not claim.restarts:
                return
            if self.core_manager(claim).is_running:
                self.quarantine_unexpected(claim)  # a failed start would destroy it
                return
            try:
                self.launch(self._ledger.set_state(name, GuestState.STARTING), MANAGER.name)
            finally:
                now = self._ledger.find(name)
                if now and now.state == GuestState.STOPPED:
                    self.schedule_restart(now)


def _find_unreleased(core: CoreManager) -> tuple[str, ...]:
    """Gives back disks that were reserved, but not written."""
    try:
        core.wipe()
    except HostError as error:
        return (error.message,)
    return ()
