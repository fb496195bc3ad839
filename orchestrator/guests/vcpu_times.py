"""How long the vCPUs of all running guests have run, and waited for their CPUs, for the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from orchestrator.guests.runs import Runs
from orchestrator.host.activity import read_thread_times
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.model.state import GuestState


class VcpuTime(NamedTuple):
    """``ran``, ``waited``: seconds since the guest was started, that its thread ran, and was ready while its CPU ran another."""

    guest: str
    vcpu: int
    ran: float
    waited: float


class VcpuTimes:
    """For one thread at a time."""

    def __init__(self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger) -> None:
        self._host, self._ledger, self._runs = host, ledger, Runs(host, hypervisor)

    def read(self) -> Iterator[VcpuTime]:
        """Omits each guest whose threads are not known, such as a guest that is ending.

        Raises HostError if the times of a guest cannot be read.
        """
        claims = [claim for claim in self._ledger.read().claims if claim.state == GuestState.RUNNING]
        self._runs.keep(claims)
        for claim in claims:
            if run := self._runs.find(claim):
                times = read_thread_times(self._host, ((run.pid, tid) for tid in run.tids))
                for index, tid in enumerate(run.tids):
                    if found := times.get(tid):
                        yield VcpuTime(claim.plan.name, index, found.ran, found.waited)
