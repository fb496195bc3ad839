"""The sum of all plans, updated with each plan instead of recomputed for each request. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from orchestrator.model.cache import CachePlan
from orchestrator.model.plan import Allocated, AllocatedPages, Plan
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size


@dataclass(frozen=True)
class AllocationIndex:
    """``plans`` are by identity, since plans are immutable; ``owned`` has huge pages by node and size in bytes."""

    plans: Mapping[int, Plan] = field(default_factory=dict)
    cpus: frozenset[int] = frozenset()
    vfs: frozenset[PciAddress] = frozenset()
    numbers: frozenset[tuple[PciAddress, int]] = frozenset()
    macs: frozenset[MacAddress] = frozenset()
    owned: Mapping[tuple[int, int], int] = field(default_factory=dict)
    disks: frozenset[str] = frozenset()
    channels: frozenset[tuple[PciAddress, int]] = frozenset()
    caches: Mapping[str, CachePlan] = field(default_factory=dict)

    def updated(self, plans: Iterable[Plan]) -> AllocationIndex:
        """No two plans own the same resource: the ledger's primary keys refuse that."""
        now = {id(plan): plan for plan in plans}
        gone = [self.plans[key] for key in self.plans.keys() - now.keys()]
        new = [now[key] for key in now.keys() - self.plans.keys()]
        if not gone and not new:
            return self
        owned = Counter(self.owned)
        owned.subtract(_count_pages(gone))
        owned.update(_count_pages(new))
        return AllocationIndex(
            now,
            self.cpus.difference(*(plan.cpus for plan in gone)).union(*(plan.cpus for plan in new)),
            self.vfs.difference(vf.address for plan in gone for vf in plan.vfs) | {vf.address for plan in new for vf in plan.vfs},
            self.numbers.difference((vf.pf, vf.index) for plan in gone for vf in plan.vfs)
            | {(vf.pf, vf.index) for plan in new for vf in plan.vfs},
            self.macs.difference(nic.mac for plan in gone for nic in plan.nics) | {nic.mac for plan in new for nic in plan.nics},
            {key: count for key, count in owned.items() if count},
            self.disks.difference(*map(_name_disks, gone)).union(*map(_name_disks, new)),
            self.channels.difference(*(plan.channels for plan in gone)).union(*(plan.channels for plan in new)),
            {name: share for name, share in self.caches.items() if name not in {plan.name for plan in gone}}
            | {plan.name: plan.caches for plan in new if plan.caches},
        )

    def to_allocated(self, started: Container[str], starting: Container[str]) -> Allocated:
        """``started`` are the guests whose pages the pool shows as used.

        Read both before the topology is surveyed: a guest that starts in between is then counted twice for a moment, but never
        missed.
        """
        idle = [plan for plan in self.plans.values() if plan.name not in started]
        unused, being_started = _count_pages(idle), _count_pages(plan for plan in idle if plan.name in starting)
        pages = tuple(
            AllocatedPages(node, Size(size), count, unused[node, size], being_started[node, size])
            for (node, size), count in sorted(self.owned.items())
        )
        return Allocated(CpuSet(self.cpus), self.vfs, self.numbers, self.macs, self.disks, pages, self.channels, self.caches)


def _name_disks(plan: Plan) -> frozenset[str]:
    return frozenset({disk.key for disk in plan.disks} | {str(disk.address) for disk in plan.controllers})


def _count_pages(plans: Iterable[Plan]) -> Counter[tuple[int, int]]:
    counts: Counter[tuple[int, int]] = Counter()
    for plan in plans:
        counts[plan.node, plan.page_size.bytes] += plan.pages
    return counts
