"""core-quiet: during a time, nothing but the guest ran on its cores, except what cannot be kept away. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.host.activity import Activity
from orchestrator.host.processes import Thread
from orchestrator.model.proof import WEAKER, Measurement, count_findings, not_measured
from orchestrator.values import CpuSet

INTERRUPTS: Mapping[str, str] = {
    "LOC": "the guest's own timer, and the rest of the host's tick",
    "RES": "wakes a vCPU, or asks it to leave the guest's code",
    "CAL": "asks a CPU to run a function: KVM for the guest's own interrupts, the kernel when it changes all CPUs",
    "TLB": "QEMU, or the kernel, changed a mapping that the CPU has used",
    "IWI": "the CPU asked itself for work that an interrupt may not do",
    "PIN": "an interrupt of the guest's own device, delivered without an exit",
    "PIW": "wakes a vCPU for an interrupt of the guest's own device",
    "NPI": "an interrupt for a guest of the guest",
    "MCP": "polls the CPU's error registers every five minutes",
    "TRM": "the processor's temperature", "THR": "the processor's error threshold", "DFR": "a deferred error of the processor",
}  # fmt: skip
"""Interrupts that may occur on a guest core, by their name in /proc/interrupts, and why. Others are findings."""

SOFTIRQS: Mapping[str, str] = {
    "TIMER": "the rest of the host's tick, and timers of the vCPU's own thread",
    "HRTIMER": "timers of the vCPU's own thread",
    "SCHED": "the rest of the host's tick",
    "RCU": "a quiescent state is reported, callbacks run elsewhere",
}
"""Softirqs that may occur on a guest core, and why. Others are findings."""


@dataclass(frozen=True)
class Sample:
    """What was counted on the guest's cores until a moment."""

    time: float  # seconds, monotonic
    activity: Activity
    before: Mapping[int, int]  # slices of threads, by thread id, read before the CPUs' counters
    after: Mapping[int, int]  # and after them
    threads: tuple[Thread, ...]  # that may run, or last ran, on the cores


def prove_core_quiet(vcpus: frozenset[int], cores: CpuSet, first: Sample, last: Sample) -> Measurement:
    """``vcpus``: thread ids. The figure is the number of unexpected interrupts, softirqs and time slices."""
    if not vcpus <= first.after.keys() or not vcpus <= last.before.keys():
        return not_measured("the guest's vCPU threads exited during the measurement")
    seconds = last.time - first.time
    unexpected, findings, evidence = 0, list[str](), [f"CPUs {cores}, during {seconds:.1f} s"]
    for kind, allowed, counts in (
        ("interrupts", INTERRUPTS, _grow(first.activity.interrupts, last.activity.interrupts)),
        ("softirqs", SOFTIRQS, _grow(first.activity.softirqs, last.activity.softirqs)),
    ):
        for name, count in counts.items():
            text = f"{count} {kind} {name}"
            if name in allowed:
                evidence.append(f"{text}: {allowed[name]}")
                continue
            unexpected += count
            meaning = last.activity.names.get(name, "") if kind == "interrupts" else ""
            findings.append(f"{text} ({meaning})" if meaning else text)
    slices, more, named = _judge_slices(vcpus, cores, first, last)
    result = count_findings([*findings, *more], [*evidence, *named])
    return Measurement(result.verdict, unexpected + slices, result.evidence)


def _judge_slices(vcpus: frozenset[int], cores: CpuSet, first: Sample, last: Sample) -> tuple[int, list[str], list[str]]:
    """The number of unexpected time slices, the findings, and the evidence."""
    grown = {tid: count - first.before.get(tid, 0) for tid, count in last.after.items()}
    others = [t for t in last.threads if t.tid not in vcpus and grown.get(t.tid) and (t.last_cpu in cores or t.allowed <= cores)]
    unmovable = [t for t in others if t.kernel and t.pinned_by_kernel and len(t.allowed) == 1]
    foreign = [t for t in others if t not in unmovable]
    findings = [f"{grown[t.tid]} time slices of {t}, which may run on CPUs {t.allowed}" for t in foreign]
    evidence = [f"{grown[t.tid]} time slices of {t}: the kernel pins it" for t in unmovable]
    total = sum(grown[t.tid] for t in foreign)
    if first.activity.slices is None or last.activity.slices is None:
        return (
            total,
            findings,
            [*evidence, f"{WEAKER}this kernel does not count the time slices of a CPU: threads that ended are not seen"],
        )
    # The counters of threads and CPUs are not read at one moment. Those of threads are read before and after: this is the least.
    rest = last.activity.slices - first.activity.slices - sum(grown[t.tid] for t in others) - sum(grown[tid] for tid in vcpus)
    if rest > 0:
        findings.append(f"{rest} time slices of threads that ended, began or moved during the measurement")
    of_guest = sum(last.before[tid] - first.after[tid] for tid in vcpus)
    return total + max(rest, 0), findings, [*evidence, f"{of_guest} time slices of the guest's vCPUs"]


def _grow(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """What has grown, without what has not. A line that is new has grown from 0."""
    return {name: growth for name, count in after.items() if (growth := count - before.get(name, 0)) > 0}
