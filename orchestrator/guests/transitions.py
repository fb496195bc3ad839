"""Sees to it that each guest comes to where it belongs: starts and ends it through its core manager, starts it again when it has
failed, cleans up after it, and after a crash finds out what there is. The only place that knows the order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from uuid import UUID

from orchestrator.errors import LedgerError, OrchestratorError
from orchestrator.guests.core_manager import HOST, CoreManager
from orchestrator.guests.drift_detector import Lookout
from orchestrator.guests.observer import Observer
from orchestrator.guests.recovery import MOST_RESTARTS, Action, Decision, check_housekeeping, decide, plan_pause
from orchestrator.guests.timers import Timers
from orchestrator.hypervisor.connection import End
from orchestrator.ledger import Claim, EventKind, Ledger
from orchestrator.locks import Locks
from orchestrator.model.access import MANAGER
from orchestrator.model.request import Restart
from orchestrator.model.state import SETTLED, GuestState
from orchestrator.values import CpuSet

_log = logging.getLogger(__name__)

_FAILURES = (End.FAILED, End.RESET, End.UNKNOWN)
"""Ends after which the policy ``on-failure`` starts a guest again. A reset is a panic, or a reboot, which means to go on."""

_LONG = 600.0
"""Seconds after which a guest counts as one that had come up well."""


class Supervisor:
    """Brings guests that hold a claim from state to state. Whoever calls a method that takes a claim holds the guest's lock.

    Args:
        cores: does the work on host and libvirt.
        ledger: says what was promised, and keeps what has happened.
        observer: is told of what could not be undone.
    """

    def __init__(self, cores: CoreManager, ledger: Ledger, observer: Observer) -> None:
        self.changing = Locks()
        self._cores, self._ledger, self._observer = cores, ledger, observer
        self._hypervisor = cores.hypervisor
        self._restarts = Timers()
        self._since: dict[str, float] = {}
        self._lookout = Lookout(cores, ledger)
        # Guests that were adopted, but could not be held to their cores yet.
        self._loose: set[str] = set()
        # Guests that should run, and did not at the last look.
        self._gone: set[UUID] = set()
        # What of the host could not be given back, in words.
        self._left_on_host = ""
        self._closed = False

    def close(self) -> None:
        """Starts nothing again any more. Guests go on."""
        self._closed = True
        self._restarts.close()

    def start(self, claim: Claim, who: str, made: tuple[str, ...] = ()) -> Claim:
        """Starts a guest (CREATING or STARTING) for which ``made`` was changed already. If that fails all is undone."""
        name, began = claim.plan.name, time.monotonic()
        try:
            changed = (*made, *self._cores.start(claim.plan, claim.owner))
            now = self._ledger.set_state(name, GuestState.RUNNING)
        except BaseException as error:
            why = error.message if isinstance(error, OrchestratorError) else repr(error)
            # First: the cleaning may be cut short, and nobody would ever know why it was needed.
            self.note(EventKind.FAILED, claim, why, who, time.monotonic() - began)
            self._quietly(lambda: self._undo_start(claim, who))
            raise
        self._since[name] = time.monotonic()
        self.note(
            EventKind.STARTED, now, "; ".join((f"on CPUs {CpuSet.of(claim.plan.cpus)}", *changed)), who, time.monotonic() - began
        )
        return now

    def _undo_start(self, claim: Claim, who: str) -> None:
        """Undoes what was done to start a guest; see ``start``."""
        name = claim.plan.name
        if claim.state == GuestState.CREATING:
            self.delete(self._ledger.set_state(name, GuestState.DELETING), "", "", who)
        else:
            # Counted only where somebody waits for it to be tried again: whoever asked has the error.
            again = claim.restarts + 1 if claim.restarts else 0
            self._end(self._ledger.set_state(name, GuestState.STOPPING, restarts=again), "", "", who)

    def stop(self, claim: Claim, who: str, timeout: float) -> Claim:
        """Asks a guest to power off, ends it if it has not after ``timeout`` seconds, and cleans up. Its claim is kept."""
        name, began = claim.plan.name, time.monotonic()
        self.cancel_restart(name)
        claim = self._ledger.set_state(name, GuestState.STOPPING, restarts=0)
        if claim.plan.uuid not in self._hypervisor.uuids():
            how = "it had ended already"
        elif not timeout:
            how = "ended at once"
        elif self._cores.shut_down(claim.plan, timeout):
            how = "powered off"
        else:  # after less than it was given, if a `kill` has cut that short
            how = f"ended, since it had not powered off after {round(min(timeout, time.monotonic() - began), 1):g} s"
        return self._end(claim, EventKind.STOPPED, how, who, began)

    def delete(self, claim: Claim, kind: str, why: str, who: str, began: float | None = None) -> tuple[str, ...]:
        """Cleans up after a guest in the state DELETING; its claim is released then, or it is QUARANTINED; returns why.

        Args:
            kind: of the event that tells of its end; empty if that was told.
        """
        self.cancel_restart(claim.plan.name)
        findings = self._cores.clean(claim.plan)
        if findings:
            self._keep_unclean(claim, findings, who)
        else:
            self.release(claim, kind, why, who, began)
        return findings

    def release(self, claim: Claim, kind: str, why: str, who: str, began: float | None = None) -> None:
        """Gives the guest's claim free, and after the last one the host back; ``kind`` as for ``delete``."""
        name = claim.plan.name
        self._ledger.release(name)
        # What was noted by name must not be taken for the next guest's of that name.
        self.cancel_restart(name)
        self._lookout.forget(name)
        self._loose.discard(name)
        self._since.pop(name, None)
        self.note(kind, claim, why, who, began and time.monotonic() - began)
        self.release_host()

    def release_host(self) -> None:
        """Undoes what serves all guests, if there is none. What can't be undone is told once, and tried again."""
        try:
            self._cores.release_host()
            self._left_on_host = ""
        except OrchestratorError as error:
            before, self._left_on_host = self._left_on_host, error.message
            if self._left_on_host != before:
                self._observer.count_undo_failure()
                self._quietly(lambda: self._ledger.log(EventKind.UNDO_FAILED, HOST, self._left_on_host))

    def recover(self, progress: Callable[[], object] = lambda: None) -> None:
        """After a start: compares ledger and libvirt, and brings each guest to where it belongs. Ends none that runs.

        What can't be cleaned goes into quarantine, and nobody gets it.

        Args:
            progress: called before each guest.

        Raises:
            Conflict: the configuration takes a guest's cores; nothing was done.
        """
        claims = self._ledger.read().claims
        check_housekeeping(claims, self._cores.policy.housekeeping)
        self._quietly(self._lookout.begin)
        for claim in claims:
            progress()
            with self.changing(claim.plan.name):
                self.recover_one(claim, adopt=True)
        self.release_host()

    def collect(self) -> None:
        """The same for guests whose end nobody told, and for what failed half-way, as when libvirt was away. Whoever is just
        changing a guest sees to it himself: a stop may take an hour.
        """
        claims = self._ledger.read().claims
        # libvirt is asked once for all, not once for each; a guest that looks amiss is locked and looked at anew.
        running = self._hypervisor.uuids() if claims else frozenset()
        # Acted on when seen twice: an end that is being told just now says more than that there was one.
        missed = self._gone
        self._gone = {claim.plan.uuid for claim in claims if claim.state == GuestState.RUNNING} - running
        for claim in claims:
            decision = decide(claim.state, running=claim.plan.uuid in running)
            if decision.state == claim.state and claim.state in SETTLED and claim.plan.name not in self._loose:
                continue
            with self.changing.if_free(claim.plan.name) as held:
                now = self._ledger.find(claim.plan.name) if held else None
                if now and (now.plan.uuid not in self._gone or now.plan.uuid in missed):
                    self.recover_one(now)
        if self._left_on_host:
            self.release_host()

    def ended(self, uuid: UUID, end: End) -> None:
        """A guest has ended, ours or not."""
        for claim in self._ledger.read().claims:
            if claim.plan.uuid == uuid:
                with self.changing(claim.plan.name):
                    now = self._ledger.find(claim.plan.name)
                    # Somebody may have seen to it meanwhile, or have started it again.
                    if now and now.plan.uuid == uuid and now.state == GuestState.RUNNING and uuid not in self._hypervisor.uuids():
                        self._after_end(now, end)

    def check(self) -> None:
        """Compares each running guest with its claim. What differs is reported, and put right only where that cannot hurt."""
        claims = self._ledger.read().claims
        self._quietly(self._lookout.begin)
        for claim in claims:
            if claim.state == GuestState.RUNNING:
                with self.changing.if_free(claim.plan.name) as held:
                    now = self._ledger.find(claim.plan.name) if held else None
                    # Another guest may have its name by now.
                    if now and now.plan == claim.plan and now.state == GuestState.RUNNING:
                        self._quietly(partial(self._lookout.look_at, now))
        self._lookout.look_at_pools(claims)

    def uses(self, interface: str) -> bool:
        """Whether a guest has a VF of this PF: it may be no uplink any more by the configuration, or be renamed."""
        return any(self._cores.has_interface(claim.plan, interface) for claim in self._ledger.read().claims)

    def links_changed(self) -> None:
        """Puts the PFs of guests back into VEPA mode if a PF reset took them out of it (with igb each reset does), and sees to it
        that the next look is at their VFs too: the kernel tells of each that is set (do_setlink(), rtnetlink.c).
        """
        self._lookout.links_changed()
        for plan in {nic.pf: claim.plan for claim in self._ledger.read().claims for nic in claim.plan.nics}.values():
            try:
                self._cores.keep_edge_mode(plan)
            except OrchestratorError as error:
                # The other PFs' guests must not suffer from this one.
                _log.error("PF %s is not in VEPA mode: %s", plan.vf.pf, error)

    def _end(self, claim: Claim, kind: str, why: str, who: str, began: float | None = None) -> Claim:
        """Cleans up after a guest in the state STOPPING; it is STOPPED then, or QUARANTINED."""
        findings = self._cores.clean(claim.plan)
        if findings:
            return self._keep_unclean(claim, findings, who)
        now = self._ledger.set_state(claim.plan.name, GuestState.STOPPED)
        self.note(kind, now, why, who, began and time.monotonic() - began)
        return now

    def _keep_unclean(self, claim: Claim, findings: tuple[str, ...], who: str) -> Claim:
        self._observer.count_undo_failure()
        return self._quarantine(claim, findings, who)

    def _quarantine(self, claim: Claim, findings: tuple[str, ...], who: str) -> Claim:
        self._ledger.quarantine(claim.plan.name, findings)
        self.note(EventKind.QUARANTINED, claim, "; ".join(findings), who)
        return self._ledger.find(claim.plan.name) or claim  # it is there: its lock is held

    def recover_one(self, claim: Claim, *, adopt: bool = False) -> None:
        """Brings a guest to where it belongs, by what libvirt shows of it.

        Args:
            adopt: the manager has just started: what it keeps is said, and what waits to be started again goes on waiting.
        """
        name, running = claim.plan.name, claim.plan.uuid in self._hypervisor.uuids()
        if running and claim.state == GuestState.DELETING and self._hypervisor.is_paused(claim.plan.uuid):
            running = False  # a creation that failed, and could not be undone at once: it has not run, and nobody has it
        decision = decide(claim.state, running=running)
        if decision.state == claim.state and claim.state in SETTLED:
            self._go_on(claim, decision, adopt=adopt)
            return
        if decision.action is Action.QUARANTINE:
            self._quarantine(claim, (decision.why,), MANAGER.name)
            return
        if running:
            self._quietly(lambda: self._keep(claim, decision))
            return
        self.note(str(decision.action), claim, decision.why, MANAGER.name)
        if decision.state == GuestState.DELETING:
            claim = self._ledger.set_state(name, GuestState.DELETING)
            self._quietly(lambda: self.delete(claim, EventKind.DELETED, decision.why, MANAGER.name))
        elif claim.state == GuestState.STOPPING:
            self._quietly(lambda: self._finish(claim, decision.why))
        else:
            self._quietly(lambda: self._after_end(claim, End.UNKNOWN))

    def _go_on(self, claim: Claim, decision: Decision, *, adopt: bool) -> None:
        """Nothing is to be changed; see ``recover_one``."""
        if adopt and decision.action is not Action.NONE:
            self.note(str(decision.action), claim, decision.why, MANAGER.name)
        if decision.action is Action.ADOPT and (adopt or claim.plan.name in self._loose):
            self._loose.add(claim.plan.name)
            self._quietly(lambda: self._hold(claim))
        waits = claim.state == GuestState.STOPPED and claim.restarts and plan_pause(claim.restarts - 1) is not None
        if adopt and waits:  # else it was given up, and that was said
            self._restart_later(claim)

    def _keep(self, claim: Claim, decision: Decision) -> None:
        """Lets a guest run that was created, or that was to be ended. It counts as one that runs only then: whatever cuts this
        short, it is done again.
        """
        self._cores.settle(claim.plan)
        now = self._ledger.set_state(claim.plan.name, decision.state)
        self.note(str(decision.action), now, decision.why, MANAGER.name)

    def _hold(self, claim: Claim) -> None:
        """Sees to it that a guest which runs keeps to its cores. One that somebody has suspended stays so."""
        self._quietly(lambda: self._lookout.look_at(claim))  # first: what was changed meanwhile may let it stray
        self._cores.hold(claim.plan)
        self._loose.discard(claim.plan.name)

    def _after_end(self, claim: Claim, end: End) -> None:
        """Sees to what shall become of a guest that was to run, and has ended without us; then cleans up after it."""
        name = claim.plan.name
        if claim.request.remove and end not in _FAILURES:
            why = f"{end}; all it had was given back, as it was to be removed"
            self.delete(self._ledger.set_state(name, GuestState.DELETING), EventKind.ENDED, why, MANAGER.name)
            return
        restarts = 0
        if end in _FAILURES and claim.request.restart is Restart.ON_FAILURE:
            # One that ran for long has failed for the first time again. How long is not known after a start of the manager.
            ran = time.monotonic() - self._since.pop(name, -_LONG)
            restarts = 1 if ran >= _LONG else claim.restarts + 1
        # Noted before the cleaning, which may be cut short: that it has failed, or is to stay where it is.
        self._finish(self._ledger.set_state(name, GuestState.STOPPING, restarts=restarts), str(end))

    def _finish(self, claim: Claim, why: str) -> None:
        """Cleans up after a guest in the state STOPPING, and starts it again if that was decided when it ended."""
        now = self._end(claim, EventKind.ENDED, why, MANAGER.name)
        if now.state == GuestState.STOPPED and now.restarts:
            self._restart_later(now)

    def _restart_later(self, claim: Claim) -> None:
        """Starts a guest again after a pause; its count of restarts says the how manieth time this will be."""
        name, pause = claim.plan.name, plan_pause(claim.restarts - 1)
        if pause is None:
            self.note(
                EventKind.GAVE_UP, claim, f"it was started again {MOST_RESTARTS} times, and has failed each time", MANAGER.name
            )
        elif not self._closed:
            self._restarts.set(name, pause, lambda timer: self._quietly(lambda: self._restart(name, timer)))

    def _restart(self, name: str, timer: threading.Timer) -> None:
        with self.changing(name):
            claim = self._ledger.find(name) if self._restarts.take(name, timer) else None
            if not self._closed and claim and claim.state == GuestState.STOPPED and claim.restarts:
                if claim.plan.uuid in self._hypervisor.uuids():
                    self.recover_one(claim)  # somebody else has started it: a start that fails would end it
                    return
                try:
                    self.start(self._ledger.set_state(name, GuestState.STARTING), MANAGER.name)
                finally:
                    now = self._ledger.find(name)
                    if now and now.state == GuestState.STOPPED:
                        self._restart_later(now)

    def cancel_restart(self, name: str) -> None:
        """Forgets that a guest was to be started again."""
        self._restarts.cancel(name)

    def _quietly(self, work: Callable[[], object]) -> None:
        """Does what follows an error or an event. A further error goes to the log; it is tried again at the next start."""
        try:
            work()
        except OrchestratorError as error:
            _log.error("%s", error)

    def note(self, kind: str, claim: Claim, detail: str, who: str, took: float | None = None) -> None:
        """Logs an event of a change that was made, if it has a kind. If that fails (a full disk), the journal has it."""
        if not kind:
            return
        try:
            self._ledger.log(EventKind(kind), claim.plan.name, detail, who=who, tenant=claim.owner, took=took)
        except LedgerError as error:
            _log.error("%s %s by %s: %s; not in the event log: %s", claim.plan.name, kind, who, detail, error.message)
