"""All checks, in the order in which they are shown. docs/doctor.md has the same rows."""

from __future__ import annotations

from orchestrator.doctor import cores, devices, management, memory, network
from orchestrator.doctor.check import Check

CHECKS: tuple[Check, ...] = (*cores.CHECKS, *memory.CHECKS, *devices.CHECKS, *network.CHECKS, *management.CHECKS)
