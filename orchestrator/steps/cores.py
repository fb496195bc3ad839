"""Keeps movable kernel threads and interrupts off the guest cores.

`isolcpus` and `nohz_full` keep most of the kernel away from start; some threads (kswapdN, kcompactdN) and interrupts follow
their NUMA node all the same (kernel: Documentation/admin-guide/kernel-per-CPU-kthreads.rst). Other people's processes are
never moved: the audit names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import ENOENT, ESRCH
from typing import ClassVar

from orchestrator.errors import HostError
from orchestrator.host.cpus import read_affinity, set_affinity
from orchestrator.host.irqs import MANAGED, read_irqs, set_irq_affinity
from orchestrator.host.processes import read_threads
from orchestrator.host.root import HostRoot
from orchestrator.steps.base import Arguments
from orchestrator.values import CpuSet


@dataclass(frozen=True)
class MoveKernelThread:
    """Confines one kernel thread to the housekeeping CPUs."""

    action: ClassVar[str] = "thread-affinity"
    tid: int
    name: str
    cpus: CpuSet

    def describe(self) -> str:
        """See Step."""
        return f"confine the kernel thread {self.name} ({self.tid}) to CPUs {self.cpus}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """See Step."""
        try:
            before = read_affinity(host, self.tid)
        except HostError as error:
            if error.errno == ESRCH:
                return None  # it has ended since the threads were listed
            raise
        return None if before == self.cpus else {"tid": self.tid, "name": self.name, "cpus": str(before)}

    def apply(self, host: HostRoot) -> None:
        """See Step."""
        _set_if_there(host, self.tid, self.cpus)


@dataclass(frozen=True)
class MoveIrq:
    """Directs one interrupt to the housekeeping CPUs."""

    action: ClassVar[str] = "irq-affinity"
    number: int
    name: str
    before: CpuSet
    cpus: CpuSet

    def describe(self) -> str:
        """See Step."""
        return f"direct interrupt {self.number} ({self.name}) to CPUs {self.cpus}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """See Step."""
        if is_managed(host, self.number, self.before):
            return None
        return {"number": self.number, "name": self.name, "cpus": str(self.before)}

    def apply(self, host: HostRoot) -> None:
        """See Step."""
        set_irq_affinity(host, self.number, self.cpus)


def undo_thread_affinity(host: HostRoot, arguments: Arguments) -> None:
    """Gives a kernel thread its affinity back; one that is gone needs none. A number that was reused is left alone."""
    tid = int(str(arguments["tid"]))
    if host.find(f"proc/{tid}/comm") != arguments["name"]:
        return
    _set_if_there(host, tid, CpuSet.parse(str(arguments["cpus"])))


def undo_irq_affinity(host: HostRoot, arguments: Arguments) -> None:
    """Gives an interrupt its affinity back; one that is gone needs none. A number that was reused is left alone."""
    for irq in read_irqs(host):
        before = CpuSet.parse(str(arguments["cpus"]))
        if (irq.number, irq.name) == (arguments["number"], arguments["name"]) and irq.affinity != before:
            set_irq_affinity(host, irq.number, before)


def is_managed(host: HostRoot, number: int, affinity: CpuSet) -> bool:
    """Whether the kernel manages an interrupt itself, as it does queue interrupts of virtio and NVMe.

    Nothing shows it but that a write is refused, even of the value that it has. Such an interrupt fires only for I/O that was
    begun on its CPU, so a guest core never sees it.
    """
    try:
        set_irq_affinity(host, number, affinity)
    except HostError as error:
        # ENOENT: it went away since it was listed, which is as good.
        if error.errno not in (*MANAGED, ENOENT):
            raise
        return True
    return False


def plan_cores(host: HostRoot, housekeeping: CpuSet) -> list[MoveKernelThread | MoveIrq]:
    """The steps that clear everything movable of the kernel's own from the CPUs that are not for housekeeping."""
    threads = [
        MoveKernelThread(thread.tid, thread.name, housekeeping)
        for thread in read_threads(host)
        if thread.kernel and not thread.pinned_by_kernel and not thread.allowed <= housekeeping
    ]
    irqs = [
        MoveIrq(irq.number, irq.name, irq.affinity, housekeeping) for irq in read_irqs(host) if not irq.affinity <= housekeeping
    ]
    return [*threads, *irqs]


def _set_if_there(host: HostRoot, tid: int, cpus: CpuSet) -> None:
    """A thread that ends while we look at it runs nowhere any more."""
    try:
        set_affinity(host, tid, cpus)
    except HostError as error:
        if error.errno != ESRCH:
            raise
