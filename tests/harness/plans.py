"""What guests own, added up from all of their plans: compared with the product's index, which follows the changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from orchestrator.model.plan import Allocated, AllocatedPages, Plan
from orchestrator.values import CpuSet, Size


def add_up(plans: Iterable[Plan], started: frozenset[str] = frozenset(), starting: frozenset[str] = frozenset()) -> Allocated:
    plans = tuple(plans)
    disks = [disk for plan in plans for disk in plan.disks]
    nics = [nic for plan in plans for nic in plan.nics]
    owned: Counter[tuple[int, Size]] = Counter()
    unused: Counter[tuple[int, Size]] = Counter()
    being_started: Counter[tuple[int, Size]] = Counter()
    for plan in plans:
        owned[plan.node, plan.page_size] += plan.pages
        unused[plan.node, plan.page_size] += 0 if plan.name in started else plan.pages
        being_started[plan.node, plan.page_size] += plan.pages if plan.name in starting and plan.name not in started else 0
    return Allocated(
        cpus=CpuSet.of(cpu for plan in plans for cpu in plan.cpus),
        vfs=frozenset(nic.address for nic in nics),
        numbers=frozenset((nic.pf, nic.index) for nic in nics),
        macs=frozenset(nic.mac for nic in nics),
        disks=frozenset(name for disk in disks for name in (disk.key, str(disk.address)) if name != "None"),
        pages=tuple(
            AllocatedPages(node, size, count, unused[node, size], being_started[node, size])
            for (node, size), count in sorted(owned.items())
        ),
    )
