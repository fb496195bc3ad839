"""All checks, in the order in which they are shown. docs/doctor.md has the same rows."""

from __future__ import annotations

from orchestrator.doctor import cores, devices, exits, management, memory, network, power
from orchestrator.doctor.check import Check

CHECKS: tuple[Check, ...] = (
    *cores.CHECKS,
    *exits.CHECKS,
    *power.CHECKS,
    *memory.CHECKS,
    *devices.CHECKS,
    *network.CHECKS,
    *management.CHECKS,
)
