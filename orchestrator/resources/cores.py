"""Guest cores: moves kernel threads and interrupts off them, and confines a guest's threads to them.

`isolcpus` and `nohz_full` keep most of the kernel away; some threads (kswapdN, kcompactdN) and interrupts follow their NUMA node
nevertheless (kernel: Documentation/admin-guide/kernel-per-CPU-kthreads.rst). Programs are never moved: the audit names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from errno import ENOENT, ESRCH
from typing import ClassVar
from xml.etree.ElementTree import Element

from orchestrator.errors import HostError
from orchestrator.host.cgroups import read_cgroup
from orchestrator.host.cpus import read_affinity, read_online, set_affinity
from orchestrator.host.irqs import MANAGED, Irq, read_irq, read_irqs, set_irq_affinity
from orchestrator.host.processes import Thread, find_comm, survey_threads
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor, Pinning, RunningGuest
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Plan
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments, try_steps
from orchestrator.resources.xml import element
from orchestrator.values import CpuSet


@dataclass(frozen=True)
class ThreadBefore:
    """A kernel thread and its affinity. The name detects a reused thread id."""

    tid: int
    name: str
    cpus: CpuSet


@dataclass(frozen=True)
class IrqBefore:
    """An interrupt and its affinity. The name detects a reused number."""

    number: int
    name: str
    cpus: CpuSet


@register
@dataclass(frozen=True)
class MoveKernelThread:
    action: ClassVar[str] = "thread-affinity"
    tid: int
    name: str
    cpus: CpuSet

    def describe(self) -> str:
        return f"confine the kernel thread {self.name} ({self.tid}) to CPUs {self.cpus}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        if find_comm(host, self.tid) != self.name:
            return None  # the thread has ended since the threads were listed
        try:
            before = read_affinity(host, self.tid)
        except HostError as error:
            if error.errno == ESRCH:
                return None
            raise
        return None if before == self.cpus else to_arguments(ThreadBefore(self.tid, self.name, before))

    def apply(self, host: HostRoot) -> None:
        _set_if_there(host, self.tid, self.cpus)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        host, before = context.host, parse_arguments(ThreadBefore, arguments)
        if find_comm(host, before.tid) == before.name:
            # Offline CPUs are left out; if all are offline, the thread keeps its affinity.
            _set_if_there(host, before.tid, before.cpus & read_online(host) or before.cpus)


@register
@dataclass(frozen=True)
class MoveIrq:
    action: ClassVar[str] = "irq-affinity"
    number: int
    name: str
    cpus: CpuSet

    def describe(self) -> str:
        return f"direct interrupt {self.number} ({self.name}) to CPUs {self.cpus}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        irq = read_irq(host, self.number)
        if irq is None or irq.name != self.name:
            return None  # the interrupt was freed since the interrupts were listed
        if irq.problem:
            raise HostError(irq.problem)
        return None if irq.affinity <= self.cpus else to_arguments(IrqBefore(self.number, self.name, irq.affinity))

    def apply(self, host: HostRoot) -> None:
        set_irq_affinity(host, self.number, self.cpus)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        host, before = context.host, parse_arguments(IrqBefore, arguments)
        irq = read_irq(host, before.number)
        if irq is None or irq.name != before.name:
            return
        if irq.problem:
            raise HostError(f"{irq}: {irq.problem}")
        if irq.affinity != before.cpus:
            set_irq_affinity(host, irq.number, before.cpus)


@dataclass(frozen=True)
class Cleared:
    """What was moved off the guest cores, and what could not be moved or read and why."""

    moved: tuple[str, ...]
    failures: tuple[str, ...]


def clear_cores(host: HostRoot, ledger: Ledger, owner: str, housekeeping: CpuSet) -> Cleared:
    """Moves movable kernel threads and interrupts to the housekeeping CPUs. Raises HostError if /proc cannot be read."""
    threads, unread = survey_threads(host)
    failures = [error.message for error in unread]
    try:
        irqs = read_irqs(host)
    except HostError as unlisted:  # hidden in a container, or by the security module
        irqs = ()
        failures.append(f"interrupts: {unlisted.message}")
    failures += [f"{irq}: {irq.problem}" for irq in irqs if irq.problem]
    failures += _find_pinned_programs(host, threads, housekeeping)
    moved, failed = try_steps(host, ledger, owner, plan_isolation(threads, irqs, housekeeping))
    for step, error in failed:
        # The kernel manages queue interrupts of virtio and NVMe itself. They fire only for I/O submitted on their CPU, so
        # never on a guest core. Only a refused write identifies them. Threads and interrupts that are gone are harmless too.
        harmless = (ENOENT, ESRCH, *MANAGED) if isinstance(step, MoveIrq) else (ENOENT, ESRCH)
        if error.errno not in harmless:
            failures.append(f"{step.name}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return Cleared(moved, tuple(failures))


def _find_pinned_programs(host: HostRoot, threads: Iterable[Thread], housekeeping: CpuSet) -> list[str]:
    """Programs other than QEMU that are pinned to CPUs that guests may get, such as DPDK applications and databases."""
    guest_cpus = read_online(host) - housekeeping
    programs: dict[int, tuple[str, set[int]]] = {}
    for thread in threads:
        if not thread.kernel and thread.allowed.meets(guest_cpus) and not guest_cpus <= thread.allowed:
            name, cpus = programs.setdefault(thread.pid, (thread.name, set()))
            cpus |= thread.allowed.ids
    return [
        f"process {pid} ({name}) is pinned to CPUs {CpuSet.of(cpus)}; the manager does not move programs"
        for pid, (name, cpus) in sorted(programs.items())
        if not _is_machine(host, pid)
    ]


def _is_machine(host: HostRoot, pid: int) -> bool:
    """A process in systemd's slice for virtual machines and containers (systemd.special(7)), or one that has ended."""
    try:
        return read_cgroup(host, pid, pid).startswith("/machine.slice/")
    except HostError as error:
        return error.errno in (ENOENT, ESRCH)


def plan_isolation(threads: Iterable[Thread], irqs: Iterable[Irq], housekeeping: CpuSet) -> list[MoveKernelThread | MoveIrq]:
    """The steps that move kernel threads and interrupts to the housekeeping CPUs. Pure."""
    moves: list[MoveKernelThread | MoveIrq] = [
        MoveKernelThread(thread.tid, thread.name, housekeeping)
        for thread in threads
        if thread.kernel and not thread.pinned_by_kernel and not thread.allowed <= housekeeping
    ]
    return moves + [MoveIrq(irq.number, irq.name, housekeeping) for irq in irqs if not irq.affinity <= housekeeping]


def _set_if_there(host: HostRoot, tid: int, cpus: CpuSet) -> None:
    try:
        set_affinity(host, tid, cpus)
    except HostError as error:
        if error.errno != ESRCH:
            raise


def check_confinement(plan: Plan, housekeeping: CpuSet, running: RunningGuest, threads: tuple[Thread, ...]) -> None:
    """Raises HostError if a vCPU may run on another CPU, or another thread beyond the guest's CPUs and housekeeping. Pure."""
    own, vcpus = CpuSet.of(plan.cpus), {vcpu.tid: plan.cpus[vcpu.index] for vcpu in running.vcpus}
    for thread in threads:
        allowed = CpuSet.of([vcpus[thread.tid]]) if thread.tid in vcpus else own | housekeeping
        if not thread.allowed <= allowed:
            raise HostError(
                f"thread {thread.name} ({thread.tid}) of guest {plan.name}: affinity {thread.allowed}, allowed {allowed}",
                "check for a tuning daemon that sets affinities",
            )


def diff_pinning(plan: Plan, housekeeping: CpuSet, running: Pinning) -> tuple[str, ...]:
    """What ``restore_pinning`` would change. Pure."""
    findings = [
        f"vCPU {index}: affinity {pin}, expected {cpu}"
        for index, (pin, cpu) in enumerate(zip(running.pins, plan.cpus, strict=False))
        if tuple(pin) != (cpu,)
    ]
    if running.emulator_pin != housekeeping:
        findings.append(f"emulator threads: affinity {running.emulator_pin}, expected {housekeeping}")
    return tuple(findings)


def diff_vcpus(plan: Plan, running: Pinning) -> tuple[str, ...]:
    """Reports another number of vCPUs than planned. Pure."""
    have, expected = len(running.pins), len(plan.cpus)
    return () if have == expected else (f"{have} vCPUs, expected {expected}",)


def restore_pinning(hypervisor: Hypervisor, plan: Plan, housekeeping: CpuSet, running: Pinning) -> None:
    """The only repair of a running guest: it cannot harm the guest."""
    for index, (pin, cpu) in enumerate(zip(running.pins, plan.cpus, strict=False)):
        if tuple(pin) != (cpu,):
            hypervisor.pin(plan.uuid, index, CpuSet.of([cpu]))
    if running.emulator_pin != housekeeping:
        hypervisor.pin_emulator(plan.uuid, housekeeping)


def build_pinning(plan: Plan, housekeeping: CpuSet) -> Element:
    return element(
        "cputune",
        *(element("vcpupin", vcpu=str(vcpu), cpuset=str(cpu)) for vcpu, cpu in enumerate(plan.cpus)),
        element("emulatorpin", cpuset=str(housekeeping)),
    )
