"""Notices that the boot of a guest is over: by its call, its report that it is ready, the time of its request, or on request."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

from orchestrator.errors import GuestError, HostError, OrchestratorError
from orchestrator.guests.core_manager import CoreContext
from orchestrator.guests.exits import Exits
from orchestrator.guests.guest_access import GuestAccess
from orchestrator.guests.outcome import Outcome, log_errors, log_event
from orchestrator.guests.runs import PATIENCE, RunKey, Runs, call_aside, run_key
from orchestrator.host.histogram import is_counted
from orchestrator.host.thread_counts import CALLS, read_counter
from orchestrator.ledger import Claim, EventKind
from orchestrator.model.access import MANAGER, Identity
from orchestrator.model.disengagement import Disengagement, Signal
from orchestrator.model.event import utc_now
from orchestrator.model.exit_reasons import ExitReport
from orchestrator.model.state import GuestState

_log = logging.getLogger(__name__)

_SECONDS, _PATIENT_SECONDS = 1.0, 15.0
"""Between two readings, and after a boot that has lasted for ``_LONG_BOOT`` seconds."""
_LONG_BOOT = 600.0


class Disengagements:
    def __init__(self, context: CoreContext, exits: Exits, access: GuestAccess, runs: Runs) -> None:
        self._host, self._hypervisor, self._ledger = context.host, context.hypervisor, context.ledger
        self._exits, self._access, self._runs, self._policies = exits, access, runs, context.setup.policy.exit_policies
        self._calls: dict[RunKey, int] = {}  # of guests that have disengaged by a call, when last read

    def check(self) -> float | None:
        """One round. Returns seconds until the next; None if no guest is in its boot."""
        claims = [claim for claim in self._ledger.read().claims if claim.state == GuestState.RUNNING]
        self._runs.keep(claims)
        keys = set(map(run_key, claims))
        self._calls = {key: count for key, count in self._calls.items() if key in keys}
        booting = [claim for claim in claims if claim.disengaged is None]
        if not booting:
            return None
        calls = self._read_calls()
        waits = [self._check_guest(claim, calls) for claim in booting]
        self._note_repeated(claims, calls)
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def request(self, caller: Identity, name: str, expected: int | None = None) -> Claim:
        """Ends the boot of a running guest now; no-op if it is over. Raises GuestError if the guest does not run, and as the
        service's other changes.
        """
        with self._access.lock_for_change(caller, name, expected) as claim:
            if claim.state != GuestState.RUNNING or claim.plan.uuid not in self._hypervisor.running_uuids():
                state = "has ended" if claim.state == GuestState.RUNNING else f"is {claim.state}, not running"
                raise GuestError(f"guest {name} {state}", f"start it: nohype guest start {name}")
            return claim if claim.disengaged else self._end_boot(claim, Signal.REQUEST, caller.name) or claim

    def on_ready(self, claim: Claim) -> None:
        """The report that a guest is ready ends its boot. In a thread: the caller must not wait for libvirt."""
        work = partial(self._end_boot, claim, Signal.READY)
        threading.Thread(target=lambda: log_errors(work), name="disengage", daemon=True).start()

    def counts_calls(self) -> bool:
        """Whether the kernel counts the calls of guests now."""
        try:
            return is_counted(self._host, CALLS)
        except HostError:
            return False

    def _check_guest(self, claim: Claim, calls: dict[int, int]) -> float | None:
        """Seconds until the guest is due again; None if its boot is over."""
        run = self._runs.find(claim)
        if run is None:
            return _SECONDS
        count = sum(calls.get(tid, 0) for tid in run.tids)
        lasted = time.clock_gettime(time.CLOCK_BOOTTIME) - run.started
        limit = self._policies.find_boot_limit(claim.owner, claim.request.exit_policy, claim.request.disengage_after)
        signal = Signal.CALL if count else Signal.TIME if limit is not None and lasted >= limit else None
        if signal is None:
            pause = _SECONDS if lasted < _LONG_BOOT else _PATIENT_SECONDS
            return pause if limit is None else min(pause, limit - lasted)
        self._end_boot(claim, signal)
        self._calls[run_key(claim)] = count
        return None

    def _end_boot(self, claim: Claim, signal: Signal, caller: str = MANAGER.name) -> Claim | None:
        """None if the guest's boot is over already, or another run of it has begun."""
        report = self._read_boot(claim)
        end = Disengagement(utc_now(), signal, report.vcpus, report.why)
        now = self._ledger.record_disengagement(claim, end)
        if now:
            log_event(self._ledger, now, Outcome(EventKind.DISENGAGED, f"{_DESCRIPTIONS[signal]}; {_describe_boot(end)}", caller))
        return now

    def _read_boot(self, claim: Claim) -> ExitReport:
        """KVM's totals come from QEMU. Without them, the kernel's counts by reason from before QEMU was asked."""
        run = self._runs.peek(claim)
        reasons = self._exits.read_reasons(run.tids) if run else ExitReport((), "")
        try:
            return call_aside(lambda: self._exits.read_report(claim)).result(PATIENCE)
        except OrchestratorError as error:
            why = f"KVM's totals of the boot could not be read: {error.message}"
        except TimeoutError:
            why = f"KVM's totals of the boot could not be read: QEMU did not respond within {PATIENCE:g} s"
        return ExitReport(reasons.vcpus, "; ".join(filter(None, (why, reasons.why))))

    def _read_calls(self) -> dict[int, int]:
        """Empty if nothing listens, which is an event already (see ``HostSetup``)."""
        try:
            return read_counter(self._host, CALLS)
        except HostError:
            return {}

    def _note_repeated(self, claims: list[Claim], calls: dict[int, int]) -> None:
        """A guest that calls again changes nothing; logged once per run."""
        for claim in claims:
            key, run = run_key(claim), self._runs.find(claim)
            if run and sum(calls.get(tid, 0) for tid in run.tids) > self._calls.get(key, 1 << 62):
                del self._calls[key]
                _log.warning("guest %s: called again that its boot is over: ignored", claim.plan.name)


def _describe_boot(end: Disengagement) -> str:
    totals = [vcpu.total for vcpu in end.vcpus if vcpu.total is not None]
    if totals:
        return f"{sum(totals)} VM exits during boot"
    if counted := [sum(vcpu.reasons.values()) for vcpu in end.vcpus if vcpu.reasons is not None]:
        return f"{sum(counted)} VM exits during boot, as counted by reason: {end.why}"
    return f"VM exits during boot not measured: {end.why}"


_DESCRIPTIONS = {
    Signal.CALL: "the guest called that its boot is over",
    Signal.READY: "the guest reported ready",
    Signal.TIME: "the time limit of its boot has passed",
    Signal.REQUEST: "on request",
}
