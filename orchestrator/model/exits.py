"""VM exits of a guest by class: counts and rates from KVM's counters.

KVM's names (arch/x86/kvm/x86.c, kvm_vcpu_stats_desc) are not a stable interface: the class of a missing counter is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

TOTAL = "exits"
"""KVM's counter of all exits."""

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
"""Exit class → KVM's counter. All other exits are of class ``other``: MSR writes (the timer), page faults, CPUID."""

EMULATED = ("io", "mmio")
"""Classes that need an instruction or a device emulated."""


ReadCounters = Callable[[UUID], tuple[Mapping[str, int], ...]]
"""Reads KVM's counters of a running guest by its id, one mapping per vCPU. Raises NotFound if it has ended."""


@dataclass(frozen=True)
class ExitPolicy:
    """Limits in exits per second and vCPU."""

    total: float
    emulated: float  # of the classes EMULATED


@dataclass(frozen=True)
class ExitSample:
    """KVM's counters per vCPU, at a monotonic time in seconds."""

    time: float
    vcpus: tuple[Mapping[str, int], ...]


@dataclass(frozen=True)
class ExitRates:
    """Exits per second of one vCPU; None without a counter."""

    total: float | None
    emulated: float | None
    classes: Mapping[str, float]


def classify(counters: Mapping[str, float]) -> dict[str, float]:
    """Exits by class; ``other`` only if the total is known."""
    classes = {kind: counters[name] for kind, name in CLASSES.items() if name in counters}
    if TOTAL in counters:
        # The counters are read one after the other, so their sum may exceed the total by an exit or two.
        classes["other"] = max(0, counters[TOTAL] - sum(classes.values()))
    return classes


def add_vcpus(vcpus: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum per counter; a counter that one vCPU lacks is left out."""
    samples = tuple(vcpus)
    names = set[str]().union(*samples)
    return {name: sum(sample[name] for sample in samples) for name in names if all(name in sample for sample in samples)}


def measure_rates(before: ExitSample, after: ExitSample) -> tuple[ExitRates, ...]:
    """Per vCPU. Raises ValueError if the samples are not of one run of one guest, or without time between them."""
    seconds = after.time - before.time
    if seconds <= 0:
        raise ValueError(f"no time passed between the samples ({seconds:g} s)")
    if len(before.vcpus) != len(after.vcpus):
        raise ValueError(f"the guest had {len(before.vcpus)} vCPUs, then {len(after.vcpus)}")
    return tuple(_rates(old, new, seconds) for old, new in zip(before.vcpus, after.vcpus, strict=True))


def _rates(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> ExitRates:
    rates = {}
    for name in (TOTAL, *CLASSES.values()):
        if name not in before or name not in after:
            continue
        if after[name] < before[name]:
            raise ValueError(f"{name} fell from {before[name]} to {after[name]}: the guest was restarted between the samples")
        rates[name] = (after[name] - before[name]) / seconds
    classes = classify(rates)
    emulated = sum(classes[kind] for kind in EMULATED) if all(kind in classes for kind in EMULATED) else None
    return ExitRates(rates.get(TOTAL), emulated, classes)
