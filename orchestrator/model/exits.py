"""VM exits: how many a second, of which class, and whether that keeps to a policy. Pure; the counters come from the hypervisor.

KVM's names (arch/x86/kvm/x86.c, kvm_vcpu_stats_desc) are no stable interface: a counter may be missing, and then nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.model.proof import Proof, Verdict, not_measured

EXITS, UNIT = "exits", "exits per second of the busiest vCPU"

CLASSES: Mapping[str, str] = {
    "halt": "halt_exits",
    "io": "io_exits",
    "mmio": "mmio_exits",
    "irq": "irq_exits",
    "irq_window": "irq_window_exits",
    "hypercall": "hypercalls",
    "signal": "signal_exits",
    "nmi": "nmi_window_exits",
}
"""Class of exits → KVM's counter. What no counter names is class ``other``: MSR writes (the timer), page faults, CPUID."""

_EMULATED = ("io", "mmio")


@dataclass(frozen=True)
class ExitPolicy:
    """Bounds per vCPU and second.

    Attributes:
        total: all exits.
        emulated: exits that need an instruction or a device emulated: port I/O and memory-mapped I/O.
    """

    total: float
    emulated: float


@dataclass(frozen=True)
class ExitSample:
    """KVM's counters of all vCPUs of a guest at a time (seconds of a monotonic clock)."""

    time: float
    vcpus: tuple[Mapping[str, int], ...]


@dataclass(frozen=True)
class ExitRates:
    """Exits per second of one vCPU; None where the kernel has no such counter. ``classes`` holds what is counted only."""

    total: float | None
    emulated: float | None
    classes: Mapping[str, float]


def measure_rates(before: ExitSample, after: ExitSample) -> tuple[ExitRates, ...]:
    """Exits per second between two samples, one value a vCPU.

    Raises:
        ValueError: the samples are not of one run of one guest, or no time passed.
    """
    seconds = after.time - before.time
    if seconds <= 0:
        raise ValueError(f"no time passed between the samples ({seconds:g} s)")
    if len(before.vcpus) != len(after.vcpus):
        raise ValueError(f"the guest had {len(before.vcpus)} vCPUs, then {len(after.vcpus)}")
    return tuple(_rates(old, new, seconds) for old, new in zip(before.vcpus, after.vcpus, strict=True))


def judge_exits(name: str, before: ExitSample, after: ExitSample, policy: ExitPolicy) -> Proof:
    """The proof ``exits`` of a guest.

    Args:
        name: the guest.
        before, after: samples some seconds apart, with nothing asked of the guest in between.
    """
    try:
        rates = measure_rates(before, after)
    except ValueError as error:
        return not_measured(EXITS, name, UNIT, str(error))
    if not rates or any(rate.total is None for rate in rates):
        return not_measured(EXITS, name, UNIT, "KVM's counter `exits` is missing: this kernel or QEMU does not give it")
    totals = [rate.total for rate in rates if rate.total is not None]
    faults, gaps = [], []
    for index, (rate, total) in enumerate(zip(rates, totals, strict=True)):
        if total > policy.total:
            faults.append(f"vCPU {index}: {total:.1f} exits/s, the policy allows {policy.total:g}")
        if rate.emulated is None:
            gaps.append(f"vCPU {index}: no counters for {' and '.join(_EMULATED)}, so emulated exits cannot be bounded")
        elif rate.emulated > policy.emulated:
            faults.append(f"vCPU {index}: {rate.emulated:.1f} emulated exits/s (io, mmio), the policy allows {policy.emulated:g}")
    verdict = Verdict.FAIL if faults else Verdict.NOT_MEASURED if gaps else Verdict.PASS
    evidence = [f"over {after.time - before.time:.1f} s; policy a vCPU: {policy.total:g} exits/s, {policy.emulated:g} emulated"]
    evidence += [f"vCPU {index}: {totals[index]:.1f}/s: {_describe(rate)}" for index, rate in enumerate(rates)]
    figure = None if verdict == Verdict.NOT_MEASURED else round(max(totals), 1)
    return Proof(EXITS, name, verdict, figure, UNIT, (*faults, *gaps, *evidence))


def _rates(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> ExitRates:
    def rate(counter: str) -> float | None:
        if counter not in before or counter not in after:
            return None
        if after[counter] < before[counter]:
            raise ValueError(f"{counter} fell from {before[counter]} to {after[counter]}: the guest was started again in between")
        return (after[counter] - before[counter]) / seconds

    counted = {kind: value for kind, counter in CLASSES.items() if (value := rate(counter)) is not None}
    total = rate("exits")
    classes = dict(counted)
    if total is not None:
        # The counters are read one after the other, so their sum may pass the total by an exit or two.
        classes["other"] = max(0.0, total - sum(counted.values()))
    emulated = sum(counted[kind] for kind in _EMULATED) if all(kind in counted for kind in _EMULATED) else None
    return ExitRates(total, emulated, classes)


def _describe(rate: ExitRates) -> str:
    return ", ".join(f"{kind} {value:.1f}" for kind, value in rate.classes.items() if value) or "none"
