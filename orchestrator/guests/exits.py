"""VM exits of a guest by hardware reason, as callers see them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from orchestrator.errors import GuestError, HostError, HypervisorError, NotFound
from orchestrator.guests.guest_access import GuestAccess
from orchestrator.host.exit_trace import read_counts
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.access import Identity
from orchestrator.model.disengagement import Phase, count_boot, count_run
from orchestrator.model.exit_reasons import ExitReport, ExitTrace, build_report
from orchestrator.model.exits import ReadCounters
from orchestrator.model.state import GuestState

_log = logging.getLogger(__name__)

_START = "start it: exits are counted while it runs"


class Exits:
    def __init__(self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, access: GuestAccess) -> None:
        self._host, self._hypervisor, self._ledger, self._access = host, hypervisor, ledger, access

    def read(self, caller: Identity, name: str, phase: Phase | None = None) -> ExitReport:
        """Exits since the start, or in one phase. Raises NotFound as the service's other methods do, and GuestError if the guest
        does not run, or is not in this phase yet.
        """
        claim = self._access.find(caller, name)
        if claim.state != GuestState.RUNNING:
            raise GuestError(f"guest {name} is {claim.state}, not running", _START)
        try:
            if phase is Phase.RUN and not claim.disengaged:
                what = f"guest {name} is in its boot: it has not disengaged"
                raise GuestError(what, f"wait, or end its boot: nohype guest disengage {name}")
            if claim.disengaged and phase is Phase.BOOT:
                return count_boot(claim.disengaged)
            report = self.read_report(claim)
            return count_run(claim.disengaged, report) if claim.disengaged and phase else report
        except NotFound:  # the domain, not the guest
            raise GuestError(f"guest {name} has ended", _START) from None

    def read_report(self, claim: Claim) -> ExitReport:
        """Raises NotFound if the domain has ended, HypervisorError."""
        return self._report(claim, self._read_trace(), self._hypervisor.read_exits)

    def read_reasons(self, tids: tuple[int, ...]) -> ExitReport:
        """Of these vCPUs, without KVM's totals: QEMU is not asked. Those of an earlier thread with the same id are included."""
        return build_report(tids, (), self._read_trace())

    def read_all(self, read_counters: ReadCounters) -> Iterator[tuple[str, Phase, ExitReport]]:
        """Of all running guests that can be read, by name and phase. Raises HypervisorError if libvirt cannot be reached.

        ``read_counters`` is called after the trace was read, so that the counters are never behind it.
        """
        claims = [claim for claim in self._ledger.read().claims if claim.state == GuestState.RUNNING]
        trace = self._read_trace() if claims else ""
        for claim in claims:
            try:
                report = self._report(claim, trace, read_counters)
                if claim.disengaged:
                    yield claim.plan.name, Phase.BOOT, count_boot(claim.disengaged)
                    yield claim.plan.name, Phase.RUN, count_run(claim.disengaged, report)
                else:
                    yield claim.plan.name, Phase.BOOT, report
            except NotFound:
                continue  # the guest has ended in the meantime
            except HypervisorError as error:
                # A guest that is ending cannot be read. The call below raises if libvirt cannot be reached at all.
                if claim.plan.uuid in self._hypervisor.running_uuids():
                    _log.warning("no exits by reason of guest %s: %s", claim.plan.name, error)

    def _report(self, claim: Claim, trace: ExitTrace | str, read_counters: ReadCounters) -> ExitReport:
        vcpus = self._hypervisor.read_guest(claim.plan.uuid).vcpus
        return build_report(tuple(vcpu.tid for vcpu in vcpus), read_counters(claim.plan.uuid), trace)

    def _read_trace(self) -> ExitTrace | str:
        try:
            return read_counts(self._host)
        except HostError as error:
            return f"exits are not counted by reason: {error.message}"
