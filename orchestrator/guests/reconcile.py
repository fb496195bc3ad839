"""Reconciles ledger and libvirt: after a start of the manager, every minute, and when a guest ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from uuid import UUID

from orchestrator.guests.core_manager import CoreContext
from orchestrator.guests.drift import DriftDetector
from orchestrator.guests.host_setup import HOST
from orchestrator.guests.outcome import Outcome, log_errors, log_event
from orchestrator.guests.recovery import Decision, RecoveryAction, check_housekeeping, decide
from orchestrator.guests.transitions import Transitions
from orchestrator.hypervisor.connection import EndCause
from orchestrator.ledger import Claim, EventKind
from orchestrator.model.host_view import Drift
from orchestrator.model.state import SETTLED, GuestState


class Reconciler:
    """Decides what happens to each guest; ``Transitions`` makes the change."""

    def __init__(self, context: CoreContext, transitions: Transitions) -> None:
        self._hypervisor, self._ledger, self._setup = context.hypervisor, context.ledger, context.setup
        self._secrets = context.secrets
        self._transitions = transitions
        self._drift = DriftDetector(context)
        self._taps_due = False
        # Adopted guests that could not be confined yet.
        self._unconfined: set[UUID] = set()
        # RUNNING guests that did not run in the last round.
        self._seen_not_running: set[UUID] = set()

    def recover(self, progress: Callable[[], object] = lambda: None) -> None:
        """After a start of the manager: brings each guest to a settled state. Ends no running guest.

        Calls ``progress`` before each guest. Raises Conflict, and does nothing, if a guest owns housekeeping CPUs.
        """
        claims = self._ledger.read().claims
        check_housekeeping(claims, self._setup.policy.housekeeping)
        log_errors(partial(self._drift.begin_round, claims))
        for claim in claims:
            progress()
            with self._transitions.guest_locks(claim.plan.name):
                self.reconcile_guest(claim, adopt=True)
        self._setup.release()
        log_errors(self._setup.restore_isolation)
        log_errors(self._setup.count_returns)
        log_errors(self._secrets.remove_orphans)

    def reconcile(self) -> None:
        """Handles unreported ends and changes that failed half-way, for example because libvirt was not reachable.

        Skips a guest that another thread is changing: a stop can take an hour.
        """
        claims = self._ledger.read().claims
        # One call for all guests. A guest that differs is locked and read again.
        running = self._hypervisor.running_uuids() if claims else frozenset()
        # An end is handled when seen twice: libvirt's event, which has the cause, may still arrive.
        seen_before = self._seen_not_running
        self._seen_not_running = {claim.plan.uuid for claim in claims if claim.state == GuestState.RUNNING} - running
        self._unconfined &= {claim.plan.uuid for claim in claims}
        for claim in claims:
            decision = decide(claim.state, running=claim.plan.uuid in running)
            if _is_settled(claim, decision) and claim.plan.uuid not in self._unconfined:
                continue
            with self._transitions.guest_locks.try_acquire(claim.plan.name) as held:
                now = self._ledger.find(claim.plan.name) if held else None
                if now and (now.plan.uuid not in self._seen_not_running or now.plan.uuid in seen_before):
                    self.reconcile_guest(now)
        self._setup.retry_release()
        log_errors(self._secrets.remove_orphans)

    def reconcile_guest(self, claim: Claim, *, adopt: bool = False) -> None:
        """The caller holds the guest's lock. ``adopt``: at the manager's start, reports running guests and schedules restarts."""
        running = claim.plan.uuid in self._hypervisor.running_uuids()
        if running and claim.state == GuestState.DELETING and self._hypervisor.is_paused(claim.plan.uuid):
            running = False  # a failed creation whose cleanup failed: it has not run, and its caller has the error
        decision = decide(claim.state, running=running)
        if _is_settled(claim, decision):
            self._keep_settled(claim, decision, adopt=adopt)
            return
        if decision.action is RecoveryAction.QUARANTINE:
            self._transitions.quarantine_unexpected(claim)
            return
        outcome = Outcome(EventKind(decision.action), decision.why)
        if claim.state == GuestState.WIPING:
            if self._transitions.resume_wiping(claim):
                log_event(self._ledger, claim, outcome)
            return
        if running:
            log_errors(lambda: self._transitions.adopt(claim, decision.state, outcome))
            return
        log_event(self._ledger, claim, outcome)
        log_errors(lambda: self._finish(claim, decision))

    def on_guest_ended(self, uuid: UUID, cause: EndCause) -> None:
        """Handles libvirt's event. The guest can be an unmanaged one."""
        for claim in self._ledger.read().claims:
            if claim.plan.uuid == uuid:
                with self._transitions.guest_locks(claim.plan.name):
                    now = self._ledger.find(claim.plan.name)
                    # Another thread may have handled the end, or have started the guest again.
                    if (
                        now
                        and now.plan.uuid == uuid
                        and now.state == GuestState.RUNNING
                        and uuid not in self._hypervisor.running_uuids()
                    ):
                        self._transitions.handle_unrequested_end(now, cause)

    def detect_drift(self) -> None:
        claims = self._ledger.read().claims
        log_errors(partial(self._drift.begin_round, claims))
        self._check_guests(lambda _: True)
        self._drift.check_pools(claims)
        log_errors(self._setup.restore_exit_counts)
        log_errors(self._setup.count_returns)

    def list_drift(self) -> tuple[Drift, ...]:
        """Of running guests and of the host."""
        running = {claim.plan.name for claim in self._ledger.read().claims if claim.state == GuestState.RUNNING}
        return tuple(drift for drift in self._drift.list_current() if drift.subject in running | {HOST})

    def _check_guests(self, is_due: Callable[[Claim], bool]) -> bool:
        """Returns whether a guest was busy, and therefore not checked."""
        was_busy = False
        for claim in self._ledger.read().claims:
            if claim.state == GuestState.RUNNING and is_due(claim):
                with self._transitions.guest_locks.try_acquire(claim.plan.name) as held:
                    was_busy |= not held
                    now = self._ledger.find(claim.plan.name) if held else None
                    # Another guest may have the name by now.
                    if now and now.plan == claim.plan and now.state == GuestState.RUNNING:
                        log_errors(partial(self._drift.check_guest, now))
        return was_busy

    def has_guest_on(self, interface: str) -> bool:
        return self._setup.has_guest_on(interface)

    def on_link_change(self) -> None:
        """Restores VEPA mode on the PFs of guests, which a PF reset switches off (with igb, every one), and changed taps."""
        self._drift.on_link_change()
        self._setup.restore_edge_modes()
        self.check_taps()

    def check_taps(self) -> None:
        """Restores changed taps and rules of software edges. See ``taps_due``."""
        self._taps_due = self._check_guests(lambda claim: bool(claim.plan.software_nics and self._drift.has_changed_taps(claim)))
        log_errors(self._setup.count_returns)  # after the rules that filter

    @property
    def has_taps(self) -> bool:
        """Whether any guest has a software edge."""
        return any(claim.plan.software_nics for claim in self._ledger.read().claims)

    @property
    def taps_due(self) -> bool:
        """The last ``check_taps`` left out a guest with changed taps, which was busy: the kernel does not announce them again."""
        return self._taps_due

    def _finish(self, claim: Claim, decision: Decision) -> None:
        if decision.state == GuestState.DELETING:
            self._transitions.delete(claim, Outcome(EventKind.DELETED, decision.why))
        elif claim.state == GuestState.STOPPING:
            self._transitions.finish_interrupted_stop(claim, decision.why)
        else:
            self._transitions.handle_unrequested_end(claim, EndCause.UNKNOWN)

    def _keep_settled(self, claim: Claim, decision: Decision, *, adopt: bool) -> None:
        if adopt and decision.action is not RecoveryAction.NONE:
            log_event(self._ledger, claim, Outcome(EventKind(decision.action), decision.why))
        if decision.action is RecoveryAction.ADOPT and (adopt or claim.plan.uuid in self._unconfined):
            self._unconfined.add(claim.plan.uuid)
            log_errors(lambda: self._confine_adopted(claim))
        if adopt and claim.state == GuestState.STOPPED and claim.restarts:
            self._transitions.restarts.schedule(claim)  # a guest that was given up is reported already

    def _confine_adopted(self, claim: Claim) -> None:
        """A guest that was suspended outside the manager stays suspended."""
        log_errors(lambda: self._drift.check_guest(claim))  # first: a changed pinning lets it reach beyond its cores
        core = self._transitions.core_manager(claim)
        core.record_start(core.confine(), at_launch=False)
        self._unconfined.discard(claim.plan.uuid)


def _is_settled(claim: Claim, decision: Decision) -> bool:
    return decision.state == claim.state and claim.state in SETTLED
