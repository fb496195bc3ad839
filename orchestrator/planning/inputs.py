"""What planning starts from."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model.plan import Allocated, Policy
from orchestrator.model.topology import Topology


@dataclass(frozen=True)
class PlanningInput:
    """The host, what of it is allocated, and what the operator keeps from guests."""

    topology: Topology
    allocated: Allocated
    policy: Policy
