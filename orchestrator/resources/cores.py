"""Keeps movable kernel threads and interrupts off the guest cores.

`isolcpus` and `nohz_full` keep most of the kernel away from start; some threads (kswapdN, kcompactdN) and interrupts follow
their NUMA node all the same (kernel: Documentation/admin-guide/kernel-per-CPU-kthreads.rst). Other people's processes are
never moved: the audit names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from errno import ENOENT, ESRCH
from typing import ClassVar

from lxml import etree

from orchestrator.errors import HostError
from orchestrator.host.cgroups import read_cgroup
from orchestrator.host.cpus import read_affinity, read_online, set_affinity
from orchestrator.host.irqs import MANAGED, Irq, read_irq, read_irqs, set_irq_affinity
from orchestrator.host.processes import Thread, find_comm, survey_threads
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor, Pinning, RunningGuest
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Plan
from orchestrator.resources.step import Arguments, UndoContext, register, try_steps
from orchestrator.resources.xml import element
from orchestrator.values import CpuSet


@register
@dataclass(frozen=True)
class MoveKernelThread:
    """Confines one kernel thread to the housekeeping CPUs."""

    action: ClassVar[str] = "thread-affinity"
    tid: int
    name: str
    cpus: CpuSet

    def describe(self) -> str:
        return f"confine the kernel thread {self.name} ({self.tid}) to CPUs {self.cpus}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        if find_comm(host, self.tid) != self.name:
            return None  # it has ended since the threads were listed; its number may be another's
        try:
            before = read_affinity(host, self.tid)
        except HostError as error:
            if error.errno == ESRCH:
                return None
            raise
        return None if before == self.cpus else {"tid": self.tid, "name": self.name, "cpus": str(before)}

    def apply(self, host: HostRoot) -> None:
        _set_if_there(host, self.tid, self.cpus)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """A thread that has ended needs no undo; one that has the number of another is left alone."""
        host, tid, cpus = context.host, int(str(arguments["tid"])), CpuSet.parse(str(arguments["cpus"]))
        if find_comm(host, tid) != arguments["name"]:
            return
        # The kernel leaves out CPUs that are offline now; if all are, the thread keeps the affinity it has.
        _set_if_there(host, tid, cpus & read_online(host) or cpus)


@register
@dataclass(frozen=True)
class MoveIrq:
    """Directs one interrupt to the housekeeping CPUs."""

    action: ClassVar[str] = "irq-affinity"
    number: int
    name: str
    cpus: CpuSet

    def describe(self) -> str:
        return f"direct interrupt {self.number} ({self.name}) to CPUs {self.cpus}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        irq = read_irq(host, self.number)
        if irq is None or irq.name != self.name:
            return None  # it has gone since the interrupts were listed; its number may be another's
        if irq.problem:
            raise HostError(irq.problem)
        return None if irq.affinity <= self.cpus else {"number": self.number, "name": self.name, "cpus": str(irq.affinity)}

    def apply(self, host: HostRoot) -> None:
        set_irq_affinity(host, self.number, self.cpus)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """An interrupt that is gone needs no undo; one that has the number of another is left alone."""
        host, before = context.host, CpuSet.parse(str(arguments["cpus"]))
        irq = read_irq(host, int(str(arguments["number"])))
        if irq is None or irq.name != arguments["name"]:
            return
        if irq.problem:
            raise HostError(f"{irq}: {irq.problem}")
        if irq.affinity != before:
            set_irq_affinity(host, irq.number, before)


@dataclass(frozen=True)
class Cleared:
    """What became of the threads and interrupts that could be on guest cores.

    Attributes:
        moved: what was moved, in words.
        left: what could not be moved or read, and why, a sentence each.
    """

    moved: tuple[str, ...]
    left: tuple[str, ...]


def clear_cores(host: HostRoot, ledger: Ledger, owner: str, housekeeping: CpuSet) -> Cleared:
    """Moves everything movable of the kernel's own to the housekeeping CPUs. What cannot be moved is named, and stops nothing.

    Raises:
        HostError: /proc cannot be read at all.
    """
    threads, unread = survey_threads(host)
    left = [error.message for error in unread]
    try:
        irqs = read_irqs(host)
    except HostError as unlisted:  # hidden in a container, or by the security module
        irqs = ()
        left.append(f"interrupts: {unlisted.message}")
    left += [f"{irq}: {irq.problem}" for irq in irqs if irq.problem]
    left += _find_pinned_programs(host, threads, housekeeping)
    moved, failed = try_steps(host, ledger, owner, plan_cores(threads, irqs, housekeeping))
    for step, error in failed:
        # Queue interrupts of virtio and NVMe, which the kernel manages itself, fire only for I/O that was begun on their CPU: a
        # guest core never sees them. Only a refused write shows that. What has gone disturbs nothing either.
        harmless = (ENOENT, ESRCH, *MANAGED) if isinstance(step, MoveIrq) else (ENOENT, ESRCH)
        if error.errno not in harmless:
            left.append(f"{step.name}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return Cleared(moved, tuple(left))


def _find_pinned_programs(host: HostRoot, threads: Iterable[Thread], housekeeping: CpuSet) -> list[str]:
    """Programs that are pinned to CPUs which guests may get, as DPDK's and databases are; guests' QEMU is not among them."""
    everything = read_online(host) - housekeeping
    found: dict[int, tuple[str, set[int]]] = {}
    for thread in threads:
        if not thread.kernel and thread.allowed.meets(everything) and not everything <= thread.allowed:
            name, cpus = found.setdefault(thread.pid, (thread.name, set()))
            cpus |= thread.allowed.ids
    return [
        f"process {pid} ({name}) is pinned to CPUs {CpuSet.of(cpus)}; the manager moves no programs"
        for pid, (name, cpus) in sorted(found.items())
        if not _is_machine(host, pid)
    ]


def _is_machine(host: HostRoot, pid: int) -> bool:
    """Whether a process is in systemd's slice of virtual machines and containers (systemd.special(7)), or has ended."""
    try:
        return read_cgroup(host, pid, pid).startswith("/machine.slice/")
    except HostError as error:
        return error.errno in (ENOENT, ESRCH)


def plan_cores(threads: Iterable[Thread], irqs: Iterable[Irq], housekeeping: CpuSet) -> list[MoveKernelThread | MoveIrq]:
    """The steps that clear everything movable of the kernel's own from the CPUs that are not for housekeeping. Pure."""
    moves: list[MoveKernelThread | MoveIrq] = [
        MoveKernelThread(thread.tid, thread.name, housekeeping)
        for thread in threads
        if thread.kernel and not thread.pinned_by_kernel and not thread.allowed <= housekeeping
    ]
    return moves + [MoveIrq(irq.number, irq.name, housekeeping) for irq in irqs if not irq.affinity <= housekeeping]


def _set_if_there(host: HostRoot, tid: int, cpus: CpuSet) -> None:
    """A thread that ends meanwhile runs nowhere any more."""
    try:
        set_affinity(host, tid, cpus)
    except HostError as error:
        if error.errno != ESRCH:
            raise


def check_confinement(plan: Plan, housekeeping: CpuSet, running: RunningGuest, threads: tuple[Thread, ...]) -> None:
    """Checks where the threads of a guest's QEMU may run. Pure.

    Raises:
        HostError: a vCPU may run elsewhere than on its CPU, or another thread beyond the guest's CPUs and housekeeping.
    """
    own, vcpus = CpuSet.of(plan.cpus), {vcpu.tid: plan.cpus[vcpu.index] for vcpu in running.vcpus}
    for thread in threads:
        allowed = CpuSet.of([vcpus[thread.tid]]) if thread.tid in vcpus else own | housekeeping
        if not thread.allowed <= allowed:
            raise HostError(
                f"thread {thread.name} ({thread.tid}) of guest {plan.name}: affinity {thread.allowed}, allowed {allowed}",
                "check for a tuning daemon that sets affinities",
            )


def diff_pinning(plan: Plan, housekeeping: CpuSet, running: Pinning) -> tuple[str, ...]:
    """What ``restore_pinning`` would change on a running guest. Pure."""
    found = [
        f"vCPU {index}: affinity {pin}, expected {cpu}"
        for index, (pin, cpu) in enumerate(zip(running.pins, plan.cpus, strict=False))
        if tuple(pin) != (cpu,)
    ]
    if running.emulator_pin != housekeeping:
        found.append(f"emulator threads: affinity {running.emulator_pin}, expected {housekeeping}")
    return tuple(found)


def diff_vcpus(plan: Plan, running: Pinning) -> tuple[str, ...]:
    """Whether a running guest has another number of vCPUs than planned. Pure."""
    have, expected = len(running.pins), len(plan.cpus)
    return () if have == expected else (f"{have} vCPUs, expected {expected}",)


def restore_pinning(hypervisor: Hypervisor, plan: Plan, housekeeping: CpuSet, running: Pinning) -> None:
    """Pins a running guest's threads as planned: the one repair that cannot harm it."""
    for index, (pin, cpu) in enumerate(zip(running.pins, plan.cpus, strict=False)):
        if tuple(pin) != (cpu,):
            hypervisor.pin(plan.uuid, index, CpuSet.of([cpu]))
    if running.emulator_pin != housekeeping:
        hypervisor.pin_emulator(plan.uuid, housekeeping)


def build_pinning(plan: Plan, housekeeping: CpuSet) -> etree._Element:
    return element(
        "cputune",
        *(element("vcpupin", vcpu=str(vcpu), cpuset=str(cpu)) for vcpu, cpu in enumerate(plan.cpus)),
        element("emulatorpin", cpuset=str(housekeeping)),
    )
