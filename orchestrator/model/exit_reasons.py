"""VM exits of a guest by hardware reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.model.exits import TOTAL

CLASSES: Mapping[str, frozenset[str]] = {
    "halt": frozenset({"hlt", "HLT", "mwait", "MWAIT_INSTRUCTION", "monitor", "MONITOR_INSTRUCTION", "UMWAIT", "TPAUSE"}),
    "io": frozenset({"io", "IO_INSTRUCTION"}),
    "msr": frozenset({"msr", "MSR_READ", "MSR_WRITE"}),
    "interrupt": frozenset({"interrupt", "EXTERNAL_INTERRUPT", "nmi", "PREEMPTION_TIMER"}),
    "interrupt window": frozenset({"vintr", "INTERRUPT_WINDOW", "NMI_WINDOW"}),
    "memory": frozenset({"npf", "EPT_VIOLATION", "EPT_MISCONFIG", "PML_FULL"}),
    "cpuid": frozenset({"cpuid", "CPUID"}),
    "hypercall": frozenset({"hypercall", "VMCALL"}),
    "apic": frozenset({"avic_incomplete_ipi", "avic_unaccelerated_access", "APIC_ACCESS", "APIC_WRITE", "EOI_INDUCED"}),
}
"""Class → KVM's names of its reasons, of SVM and VMX (arch/x86/include/uapi/asm/svm.h and vmx.h). All others: ``other``.

On SVM an access to an emulated device's memory (MMIO) is an ``npf`` too.
"""


@dataclass(frozen=True)
class ExitTrace:
    """``threads``: thread id → reason → exits. ``dropped``: exits that were not counted because the histogram was full."""

    threads: Mapping[int, Mapping[str, int]]
    dropped: int


@dataclass(frozen=True)
class VcpuExits:
    """VM exits of one vCPU since its guest started, or in one phase of the guest.

    Attributes:
        total: KVM's counter of all exits; None if this kernel or QEMU lacks it.
        reasons: exits by KVM's name of their hardware reason; None if they were not counted.
        uncounted: exits that are in ``total``, but happened before the reasons were counted; None if either is unknown.
    """

    total: int | None
    reasons: dict[str, int] | None
    uncounted: int | None


@dataclass(frozen=True)
class ExitReport:
    """``why``: why reasons are missing; empty if each vCPU has them."""

    vcpus: tuple[VcpuExits, ...]
    why: str


def build_report(tids: tuple[int, ...], counters: tuple[Mapping[str, int], ...], trace: ExitTrace | str) -> ExitReport:
    """Joins the threads of the vCPUs and KVM's counters per vCPU, which are read after the trace. A text instead of a trace: why
    there is none.

    The kernel gives thread ids again. A thread with more exits in the trace than in KVM's counter has those of an earlier thread
    too, and so its reasons are not measured.
    """
    gap, problems = trace if isinstance(trace, str) else "", []
    threads = {} if isinstance(trace, str) else trace.threads
    if isinstance(trace, ExitTrace) and trace.dropped:
        gap = f"the kernel's histogram is full: {trace.dropped} exits were not counted"
    vcpus = []
    for index, tid in enumerate(tids):
        total = counters[index].get(TOTAL) if index < len(counters) else None
        reasons = None if gap else dict(threads.get(tid, {}))
        counted = sum(reasons.values()) if reasons is not None else 0
        if total is not None and counted > total + 1:  # the tracepoint is a few instructions before the counter
            problems.append(f"the thread id of vCPU {index} was used by an earlier guest: its exits cannot be told apart")
            reasons = None
        uncounted = max(0, total - counted) if total is not None and reasons is not None else None
        vcpus.append(VcpuExits(total, reasons, uncounted))
    return ExitReport(tuple(vcpus), gap or "; ".join(problems))


def group_by_class(reasons: Mapping[str, int]) -> dict[str, int]:
    """Exits by class, without classes that have none."""
    found: dict[str, int] = {}
    for reason, count in reasons.items():
        kind = next((kind for kind, names in CLASSES.items() if reason in names), "other")
        found[kind] = found.get(kind, 0) + count
    return found
