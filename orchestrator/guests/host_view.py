"""Joins what the manager knows about the host in one view, for pictures and lists that refresh it again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from orchestrator.errors import HostError
from orchestrator.guests.allocate import Allocator
from orchestrator.guests.attention import list_attention, list_lights
from orchestrator.guests.core_manager import CoreContext
from orchestrator.guests.last_audit import AuditMemory
from orchestrator.guests.other_threads import OtherThreads
from orchestrator.guests.reconcile import Reconciler
from orchestrator.guests.runs import Run, Runs
from orchestrator.guests.unmanaged_guests import list_unmanaged
from orchestrator.guests.uplinks import Uplinks
from orchestrator.guests.vf_settings import VfReader
from orchestrator.host.activity import ThreadTimes, read_thread_times
from orchestrator.host.exit_trace import read_counts
from orchestrator.host.nvme import read_controllers
from orchestrator.ledger import Claim
from orchestrator.model.access import MANAGER, Identity
from orchestrator.model.event import utc_now
from orchestrator.model.exit_reasons import ExitTrace
from orchestrator.model.guest_view import GuestView
from orchestrator.model.host_view import CoreUse, DiskUse, GuestActivity, HostView, PageUse, UnmanagedGuest, VcpuActivity
from orchestrator.model.state import GuestState
from orchestrator.model.topology import NvmeController, Topology
from orchestrator.model.uplink import Uplink
from orchestrator.planning.capacity import count_pages, list_core_uses
from orchestrator.planning.disk import list_disk_uses
from orchestrator.planning.host_check import check_host
from orchestrator.values import CpuSet

VIEW_AGE, SURVEY_AGE, CHANGED_SURVEY_AGE, DISK_USE_AGE = 0.5, 10.0, 2.0, 300.0
"""Seconds for which a reading is used again; a survey from before the last claim, which can create VFs, for a shorter time.
Examining the use of a disk opens it exclusively for a moment.
"""


@dataclass(frozen=True)
class _Slow:
    """What is read again only with a new survey."""

    topology: Topology
    read_at: float
    uplinks: tuple[Uplink, ...]
    unmanaged: tuple[tuple[UnmanagedGuest, ...], str]
    generation: int  # of the claims


class HostViews:
    """For several threads: callers that come at the same time share one reading.

    Args:
        list_guests: returns the guests that the caller may see.

    Attributes:
        audits: the last audit, which the program that runs audits has to record.
        find_lost: by watched uplink whether frames do not return from the external switch; set by the program that watches them.
    """

    def __init__(
        self, context: CoreContext, allocator: Allocator, uplinks: Uplinks, reconciler: Reconciler,
        list_guests: Callable[[Identity], Iterable[GuestView]],
    ) -> None:  # fmt: skip
        self._host, self._hypervisor, self._ledger = context.host, context.hypervisor, context.ledger
        self._allocator, self._uplinks, self._reconciler, self._list_guests = allocator, uplinks, reconciler, list_guests
        self.audits = AuditMemory(context.ledger)
        self.find_lost: Callable[[], Mapping[str, bool]] = dict
        self._lock = threading.Lock()
        self._view: HostView | None = None
        self._slow: _Slow | None = None
        self._disks: tuple[float, tuple[NvmeController, ...], tuple[NvmeController, ...]] | None = None
        self._controllers: tuple[float, frozenset[UUID], tuple[NvmeController, ...]] | None = None
        self._runs, self._vfs = Runs(context.host, context.hypervisor), VfReader(context.host, context.ledger)
        self._others = OtherThreads(context.host)

    def read(self) -> HostView:
        """At most `VIEW_AGE` seconds old. Raises HostError if the host cannot be surveyed, HypervisorError."""
        asked_at = time.monotonic()
        with self._lock:
            # A view that was read while this caller waited is as good as a new one.
            if self._view is None or self._view.clock < asked_at - VIEW_AGE:
                self._view = self._read()
            return self._view

    def _read(self) -> HostView:
        slow, earlier = self._read_slow(), self._ledger.read().claims
        topology = replace(slow.topology, controllers=self._read_controllers(slow.read_at, earlier))
        claims = self._ledger.read().claims
        started_at = time.monotonic()
        activity = tuple(self._read_activity([claim for claim in claims if claim.state == GuestState.RUNNING]))
        guests, audit = tuple(self._list_guests(MANAGER)), self.audits.show()
        drift, quarantine = self._reconciler.list_drift(), self._ledger.quarantined()
        lost = tuple(name for name, is_lost in self.find_lost().items() if is_lost)
        return HostView(
            time=utc_now(), clock=started_at, guests=guests,
            topology=topology, survey_age=max(0.0, started_at - slow.read_at),
            cores=tuple(self._list_cores(topology, claims)), unmanaged=slow.unmanaged[0], unmanaged_why=slow.unmanaged[1],
            pages=tuple(self._list_pages(topology, claims)),
            disks=tuple(self._list_disks(topology, (*earlier, *claims))),
            emulated_disks=bool(self._uplinks.policy.disk_folder or self._uplinks.policy.disk_group),
            uplinks=slow.uplinks, vfs=self._vfs.read(topology), lost=lost,
            activity=activity, audit=audit, drift=drift, quarantine=quarantine,
            attention=list_attention(guests, quarantine, drift, lost, audit, check_host(self._uplinks.policy, topology)),
            lights=list_lights(audit, guests),
        )  # fmt: skip

    def _read_slow(self) -> _Slow:
        now, slow, generation = time.monotonic(), self._slow, self._ledger.read().generation
        max_age = SURVEY_AGE if slow is None or slow.generation == generation else CHANGED_SURVEY_AGE
        pools, started_at = self._allocator.surveys.get_dated(now - max_age)
        if slow is None or slow.read_at < now - max_age:
            managed = frozenset(claim.plan.uuid for claim in self._ledger.read().claims)
            unmanaged = list_unmanaged(self._host, self._hypervisor, managed, pools.cpus)
            slow = _Slow(pools, started_at, self._uplinks.list(MANAGER, pools), unmanaged, generation)
        self._slow = replace(slow, topology=replace(slow.topology, pools=pools.pools, promised=pools.promised))
        return self._slow

    def _read_controllers(self, surveyed_at: float, claims: Iterable[Claim]) -> tuple[NvmeController, ...]:
        """Read with each survey, and if guests with disks have come or gone since: the drivers of a survey would be outdated.

        ``claims`` were read before.
        """
        owners = frozenset(claim.plan.uuid for claim in claims if claim.plan.controllers)
        if self._controllers is None or self._controllers[:2] != (surveyed_at, owners):
            self._controllers = surveyed_at, owners, read_controllers(self._host)
        return self._add_disk_use(self._controllers[2], time.monotonic())

    def _add_disk_use(self, controllers: tuple[NvmeController, ...], now: float) -> tuple[NvmeController, ...]:
        if self._disks is None or self._disks[1] != controllers or self._disks[0] < now - DISK_USE_AGE:
            self._disks = (now, controllers, self._allocator.read_disk_use(controllers))
        return self._disks[2]

    def _list_cores(self, topology: Topology, claims: Sequence[Claim]) -> Iterator[CoreUse]:
        plans = {claim.plan.name: claim.plan for claim in claims}
        for core, use, guest in list_core_uses(topology, plans, _quarantined(claims), self._uplinks.policy):
            yield CoreUse(core.cpus, core.socket, core.node, use, guest)

    def _list_pages(self, topology: Topology, claims: Sequence[Claim]) -> Iterator[PageUse]:
        plans = {claim.plan.name: claim.plan for claim in claims}
        idle = (GuestState.STOPPED, GuestState.QUARANTINED)  # as for the metrics
        started = {claim.plan.name for claim in claims if claim.state not in idle}
        counts = count_pages(topology, plans, _quarantined(claims), started, self._uplinks.policy)
        for (node, size, use), count in counts.items():
            yield PageUse(node, size, use, count)

    def _list_disks(self, topology: Topology, claims: Sequence[Claim]) -> Iterator[DiskUse]:
        """``claims``: also those from before the controllers were read: what is released meanwhile still has its guest."""
        plans = {claim.plan.name: claim.plan for claim in claims}
        states = {claim.plan.name: str(claim.state) for claim in claims}
        for controller, use, guest, why in list_disk_uses(topology, plans, states, self._uplinks.policy):
            yield DiskUse(controller.address, controller.node, use, guest, why)

    def _read_activity(self, claims: Sequence[Claim]) -> Iterator[GuestActivity]:
        self._runs.keep(claims)
        trace = self._read_trace() if claims else ""
        unknown_threads = self._others.read() if claims else ""
        for claim in claims:
            if run := self._runs.find(claim):
                yield self._build_activity(claim, run, trace, unknown_threads)
            else:
                yield GuestActivity(
                    claim.plan.name, (), None, "its vCPUs are not known: it is ending, or its QEMU does not respond"
                )

    def _build_activity(self, claim: Claim, run: Run, trace: ExitTrace | str, unknown_threads: str) -> GuestActivity:
        times: Mapping[int, ThreadTimes] = {}
        problems = [trace] if isinstance(trace, str) else []
        problems += [unknown_threads] if unknown_threads else []
        try:
            times = read_thread_times(self._host, ((run.pid, tid) for tid in run.tids))
        except HostError as error:
            problems.append(f"times of the vCPUs: {error.message}")
        vcpus = []
        for cpu, tid in zip(claim.plan.cpus, run.tids, strict=False):
            found = times.get(tid)
            exits = None if isinstance(trace, str) else dict(trace.threads.get(tid, {}))
            vcpus.append(VcpuActivity(cpu, found.ran if found else None, found.waited if found else None, exits))
        cores = CpuSet.of(cpu for core in claim.plan.cores for cpu in core)
        return GuestActivity(claim.plan.name, tuple(vcpus), self._others.list(cores, run.tids), "; ".join(problems))

    def _read_trace(self) -> ExitTrace | str:
        try:
            trace = read_counts(self._host)
        except HostError as error:
            return f"exits are not counted by reason: {error.message}"
        return f"the kernel's histogram is full: {trace.dropped} exits were not counted" if trace.dropped else trace


def _quarantined(claims: Iterable[Claim]) -> frozenset[str]:
    return frozenset(claim.plan.name for claim in claims if claim.state == GuestState.QUARANTINED)
