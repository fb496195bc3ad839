"""The input of planning."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model.plan import Allocated, Policy
from orchestrator.model.topology import Topology


@dataclass(frozen=True)
class PlanningInput:
    topology: Topology
    allocated: Allocated
    policy: Policy
