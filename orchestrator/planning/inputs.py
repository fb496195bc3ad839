"""The input of planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.model.network import Network
from orchestrator.model.plan import Allocated, Policy
from orchestrator.model.topology import Topology


@dataclass(frozen=True)
class Site:
    """What planning needs to know about the host in addition to its survey.

    Attributes:
        networks: those that the request names, by name.
        closed: networks that the guest must not enter: without a port VLAN a VF can use each VLAN of its uplink.
        taken: VLANs of all networks: no guest gets one of them for itself.
        host_id: stable and unique, empty if the host has none.
    """

    networks: Mapping[str, Network] = field(default_factory=dict)
    host_id: str = ""
    closed: tuple[Network, ...] = ()
    taken: frozenset[int] = frozenset()


NO_SITE = Site()


@dataclass(frozen=True)
class PlanningInput:
    topology: Topology
    allocated: Allocated
    policy: Policy
    site: Site = NO_SITE
