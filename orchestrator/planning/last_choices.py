"""Resources of a plan that unmanaged domains may use later: guests get them last. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.model.plan import Plan
from orchestrator.values import CpuSet, PciAddress


def list_last_choices(plan: Plan, cpus: Mapping[int, str], vfs: Mapping[PciAddress, str]) -> tuple[str, ...]:
    """One sentence per finding. ``cpus`` and ``vfs`` map to the reason."""
    reasons: dict[str, set[int]] = {}
    for cpu in plan.cpus:
        if cpu in cpus:
            reasons.setdefault(cpus[cpu], set()).add(cpu)
    warnings = [f"CPUs {CpuSet.of(chosen)} {reason}, and no others are free" for reason, chosen in reasons.items()]
    warnings += [f"VF {vf.address} {vfs[vf.address]}, and no other is free" for vf in plan.vfs if vf.address in vfs]
    return tuple(warnings)
