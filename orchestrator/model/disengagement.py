"""The end of a guest's boot, and its VM exits before and after it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.model.exit_reasons import ExitReport, VcpuExits


class Signal(StrEnum):
    """How it became known that a guest's boot is over."""

    CALL = "call"
    """The guest made the hypercall."""
    READY = "ready"
    """The guest reported ready, and its image does not make the call."""
    TIME = "time"
    """The time that its request or an exit policy sets for the boot has passed."""
    REQUEST = "request"
    """A caller requested it."""


class Phase(StrEnum):
    BOOT = "boot"
    RUN = "run"


@dataclass(frozen=True)
class Disengagement:
    """The end of the boot of a guest's present run.

    Attributes:
        time: UTC in ISO 8601, when the manager noticed it and had read the counters.
        vcpus: empty if they could not be read; without totals if QEMU did not respond.
        why: why counts are missing; empty if each vCPU has them.
    """

    time: str
    signal: Signal
    vcpus: tuple[VcpuExits, ...]
    why: str = ""


def count_boot(at: Disengagement) -> ExitReport:
    """VM exits until a guest disengaged."""
    return ExitReport(at.vcpus, at.why)


def count_run(at: Disengagement, now: ExitReport) -> ExitReport:
    """VM exits since a guest disengaged. ``now``: those since its start."""
    if len(at.vcpus) != len(now.vcpus):
        why = at.why or f"{len(at.vcpus)} vCPUs were counted at the end of the boot, now {len(now.vcpus)}"
        return ExitReport(tuple(VcpuExits(None, None, None) for _ in now.vcpus), why)
    vcpus = tuple(_subtract(later, earlier) for later, earlier in zip(now.vcpus, at.vcpus, strict=True))
    return ExitReport(vcpus, now.why or at.why)


def _subtract(now: VcpuExits, before: VcpuExits) -> VcpuExits:
    total = None if now.total is None or before.total is None else max(0, now.total - before.total)
    if now.reasons is None or before.reasons is None:
        return VcpuExits(total, None, None)
    reasons = {name: count - before.reasons.get(name, 0) for name, count in now.reasons.items()}
    if _has_restarted(now, before):
        # All counts are of this phase, and what was counted before the restart is lost.
        reasons = now.reasons
    reasons = {name: count for name, count in reasons.items() if count}
    uncounted = None if total is None else max(0, total - sum(reasons.values()))
    return VcpuExits(total, reasons, uncounted)


def _has_restarted(now: VcpuExits, before: VcpuExits) -> bool:
    """The kernel's histogram has begun anew since: counts fell, or exits are missing that were counted before."""
    assert now.reasons is not None
    assert before.reasons is not None
    if any(now.reasons.get(name, 0) < count for name, count in before.reasons.items()):
        return True
    counted = sum(before.reasons.values())
    return None not in (now.uncounted, before.uncounted) and (now.uncounted or 0) - (before.uncounted or 0) >= max(2, counted)
