"""Caches the survey of the host: a full survey reads thousands of files, and few events change it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.errors import HostError
from orchestrator.host.cpus import read_online
from orchestrator.host.hugepages import read_free_pages, read_pool_size, survey_pools, survey_promised_pages
from orchestrator.host.interfaces import read_interfaces
from orchestrator.host.pci import VFIO, read_driver
from orchestrator.host.ports import read_up
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import find_vf, read_use
from orchestrator.host.survey import read_topology, refresh_topology
from orchestrator.locks import WatchedLock
from orchestrator.model.plan import Plan, VfPlan
from orchestrator.model.topology import PagePool, Topology
from orchestrator.values import CpuSet


class SurveyCache:
    """For several threads.

    Args:
        uplinks: interfaces whose PFs guests use.
        shared: lock that is held while resources of all guests change, such as the number of VFs.
    """

    def __init__(self, host: HostRoot, uplinks: Sequence[str], shared: WatchedLock) -> None:
        self._host, self._uplinks, self._shared = host, uplinks, shared
        # The survey, and when it was started (time.monotonic()).
        self._cached: tuple[Topology, float] | None = None
        self._renewal = threading.Lock()
        self._discards = 0

    def discard(self) -> None:
        """Makes the next `get` read the whole host. A survey that is being read now is not kept."""
        self._discards += 1
        self._cached = None

    def get(self, not_before: float) -> Topology:
        """The first of ``get_dated``."""
        return self.get_dated(not_before)[0]

    def get_dated(self, not_before: float) -> tuple[Topology, float]:
        """Current free huge pages with a survey started at ``not_before`` (time.monotonic()) or later, and when it was started.

        While VFs are being created or removed, their PF has no carrier: an older survey is as good then, and only the first
        caller waits.
        """
        cached, started = self._cached or (None, 0.0)  # read once: other threads write it
        if started < not_before:
            with self._renewal:
                cached, started = self._cached or (None, 0.0)
        if cached is None:
            with self._shared:
                return self._read(None)
        if started >= not_before and self._all_uplinks_up(cached):
            return self._with_pools(cached, read_free_pages(self._host, cached.pools)), started
        with self._shared.try_acquire() as is_held:
            if is_held:
                return self._read(cached)
        return self._with_pools(cached, survey_pools(self._host)[0]), started

    def renew(self, max_age: float) -> None:
        """Reads the host again if the survey has passed half of its maximum age, but not all of it (seconds).

        Called before the caller waits for others: those use the earlier survey meanwhile. It takes 0.4 s on a busy host, for
        which all claims would wait otherwise.
        """
        now = time.monotonic()
        cached, started = self._cached or (None, 0.0)
        if cached is None or not now - max_age <= started < now - max_age / 2 or not self._renewal.acquire(blocking=False):
            return
        try:
            with self._shared.try_acquire() as is_held:
                if is_held:
                    self._read(cached)
        finally:
            self._renewal.release()

    def still_valid(self, topology: Topology, plan: Plan) -> bool:
        """Whether online CPUs, pool size and the uplinks' carrier still match the plan's survey."""
        sizes = {(pool.node, pool.page_size): pool.total for pool in topology.pools}
        try:
            size = read_pool_size(self._host, plan.node, plan.page_size)
        except HostError:
            return False  # gone or unreadable: the next survey reports it
        online = CpuSet.of(plan.cpus) <= read_online(self._host)
        up = all(read_up(self._host, pf, interface) for pf, interface in {(vf.pf, vf.interface) for vf in plan.vfs})
        if uplinks := {nic.interface for nic in plan.software_nics}:
            up = up and uplinks <= {found.name for found in read_interfaces(self._host) if found.up}
        return online and size == sizes[plan.node, plan.page_size] and up

    def is_vf_free(self, topology: Topology, vf: VfPlan) -> bool:
        """The VF is at its planned address, or not created yet, and not in use."""
        address = find_vf(self._host, vf.pf, vf.index)
        surveyed = any(now.address == vf.address for pf in topology.pfs if pf.address == vf.pf for now in pf.vfs)
        if address is None or not surveyed:
            return address is None and not surveyed
        in_use = read_driver(self._host, address) == VFIO or read_use(self._host, address)
        return address == vf.address and not in_use

    def _read(self, cached: Topology | None) -> tuple[Topology, float]:
        started, discards = time.monotonic(), self._discards
        topology = refresh_topology(self._host, cached) if cached else read_topology(self._host)
        if discards == self._discards:
            self._cached = topology, started
        return topology, started

    def _with_pools(self, cached: Topology, pools: tuple[PagePool, ...]) -> Topology:
        sizes = (pool.page_size for pool in pools if pool.total)
        promised = survey_promised_pages(self._host, sizes)[0]
        if (pools, promised) == (cached.pools, cached.promised):
            return cached  # with its cached properties
        return replace(cached, pools=pools, promised=promised)

    def _all_uplinks_up(self, topology: Topology) -> bool:
        """A survey during a PF reset shows an uplink without carrier."""
        return all(pf.up for uplink in self._uplinks if (pf := topology.find_uplink(uplink)))
