"""What the guests of the fleet have of each node, as the controller knows it. The managers of the hosts are not asked.

Slurm does not report when a node responded last: a node that does not respond is marked after some seconds, see
`slurm.NodeState.responds`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from orchestrator.errors import CommandError, NotFound
from orchestrator.fleet import slurm
from orchestrator.values import CpuSet

_STATE = re.compile(r"\bJobState=(\w+)")
_HAVE_PLACES = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")


@dataclass(frozen=True)
class Place:
    """What a guest has on its node. ``cores`` and ``vfs`` are Slurm's indexes, ``memory`` is in MiB, ``disks`` a number."""

    guest: str
    cores: CpuSet
    vfs: CpuSet
    memory: int
    disks: int = 0


@dataclass(frozen=True)
class NodeUse:
    """A node with its guests. Also guests that are being ended have their places."""

    node: slurm.NodeState
    places: tuple[Place, ...]

    @property
    def cores(self) -> int:
        """Cores that guests have."""
        return sum(len(place.cores) for place in self.places)

    @property
    def memory(self) -> int:
        """MiB that guests have."""
        return sum(place.memory for place in self.places)

    @property
    def vfs(self) -> int:
        """VFs that guests have."""
        return sum(len(place.vfs) for place in self.places)

    @property
    def disks(self) -> int:
        """NVMe controllers that guests have."""
        return sum(place.disks for place in self.places)


def read_uses() -> tuple[NodeUse, ...]:
    """Raises OrchestratorError."""
    nodes = slurm.read_nodes()
    threads = {node.name: node.threads for node in nodes}
    places: dict[str, list[Place]] = {}
    for name, place in parse_places(slurm.read_all_jobs(), threads):
        places.setdefault(name, []).append(place)
    return tuple(NodeUse(node, tuple(places.get(node.name, ()))) for node in nodes)


def parse_places(texts: Iterable[str], threads: dict[str, int]) -> Iterator[tuple[str, Place]]:
    """Node and place of each guest that has one. ``threads``: per core, by node."""
    for text in texts:
        state = _STATE.search(text)
        if not state or state[1] not in _HAVE_PLACES:
            continue
        try:
            found = slurm.parse_allocation(0, text)
        except (NotFound, CommandError):
            continue  # a job that is not a guest
        if count := threads.get(found.node):
            cores = CpuSet.of({cpu // count for cpu in found.cpus})
            yield found.node, Place(found.name, cores, found.vfs, found.memory, found.disks)
