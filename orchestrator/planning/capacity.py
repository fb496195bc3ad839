"""Free and used capacity of a host, for metrics. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from orchestrator.host.pci import VFIO
from orchestrator.model.plan import Plan, Policy
from orchestrator.model.topology import Core, Topology
from orchestrator.values import PciAddress, Size

FREE, CLAIMED, QUARANTINED, HOUSEKEEPING = "free", "claimed", "quarantined", "housekeeping"
UNMANAGED = "foreign"  # the text is a metric's label
"""In use outside the manager: huge pages of another program, or a VF that the host or an unmanaged domain uses."""
UNUSABLE = "unusable"
"""A core that is neither isolated nor for housekeeping."""

_CORE_STATES = (FREE, CLAIMED, QUARANTINED, HOUSEKEEPING, UNUSABLE)
_PAGE_STATES = (FREE, CLAIMED, QUARANTINED, HOUSEKEEPING, UNMANAGED)
_VF_STATES = (FREE, CLAIMED, QUARANTINED, UNMANAGED)
_NVME, _EMULATED, _NETWORK, _WIPING = "nvme", "emulated", "network", "wiping"
OWNED = {QUARANTINED: QUARANTINED, _WIPING: _WIPING}
"""The use of a guest's disks by the state of the guest; otherwise they are claimed."""


def list_core_uses(
    topology: Topology, plans: Mapping[str, Plan], quarantined: Collection[str], policy: Policy
) -> Iterator[tuple[Core, str, str]]:
    """Each physical core with its use and the guest that owns it, empty without one. See ``count_cores``."""
    owners = {cpu: name for name, plan in plans.items() for cpu in plan.cpus}
    for core in topology.cores:
        guest = next((owners[cpu] for cpu in core.cpus if cpu in owners), "")
        if core.cpus & policy.housekeeping:
            yield core, HOUSEKEEPING, ""
        elif guest:
            yield core, QUARANTINED if guest in quarantined else CLAIMED, guest
        else:
            yield core, UNUSABLE if topology.isolated and not core.cpus <= topology.isolated else FREE, ""


def count_cores(
    topology: Topology, plans: Mapping[str, Plan], quarantined: Collection[str], policy: Policy
) -> dict[tuple[int, str], int]:
    """Whole physical cores by NUMA node and use, unused uses as 0. Cores that unmanaged domains are pinned to count as free.

    ``plans`` are by guest name; ``quarantined`` are guest names.
    """
    counts = {(node, use): 0 for node in sorted({core.node for core in topology.cores}) for use in _CORE_STATES}
    for core, use, _ in list_core_uses(topology, plans, quarantined, policy):
        counts[core.node, use] += 1
    return counts


def count_pages(
    topology: Topology, plans: Mapping[str, Plan], quarantined: Collection[str], started: Collection[str], policy: Policy
) -> dict[tuple[int, Size, str], int]:
    """Huge pages by NUMA node, size and use, without empty pools. ``started``: guests whose pages the pool shows as used."""
    owned: Counter[tuple[int, Size, str]] = Counter()
    used: Counter[tuple[int, Size]] = Counter()
    for name, plan in plans.items():
        owned[plan.node, plan.page_size, QUARANTINED if name in quarantined else CLAIMED] += plan.pages
        used[plan.node, plan.page_size] += plan.pages if name in started else 0
    counts: dict[tuple[int, Size, str], int] = {}
    for pool in topology.pools:
        if not pool.total:
            continue
        pages = {use: owned[pool.node, pool.page_size, use] for use in _PAGE_STATES}
        pages[UNMANAGED] = max(0, pool.total - pool.free - used[pool.node, pool.page_size])
        rest = max(0, pool.total - sum(pages.values()))
        pages[HOUSEKEEPING] = min(rest, policy.reserved(pool.page_size))
        pages[FREE] = rest - pages[HOUSEKEEPING]
        counts.update({(pool.node, pool.page_size, use): count for use, count in pages.items()})
    return counts


def count_disks(topology: Topology, plans: Mapping[str, Plan], states: Mapping[str, str]) -> dict[tuple[str, str], int]:
    """Disks by kind and state, unused states as 0. NVMe controllers without a guest count as free, or by the reason that guests
    cannot have them; whether the host uses them is not examined. ``states`` are those of guests by name.
    """
    counts = {(kind, state): 0 for kind in (_NVME, _EMULATED, _NETWORK) for state in (CLAIMED, _WIPING, QUARANTINED)}
    owned = set()
    for name, plan in plans.items():
        for disk in plan.disks:
            owned.add(disk.address)
            kind = _NETWORK if disk.target else _NVME if disk.address else _EMULATED
            counts[kind, OWNED.get(states[name], CLAIMED)] += 1
    counts |= {(_NVME, FREE): 0, (_NVME, UNUSABLE): 0}
    for controller in topology.controllers:
        if controller.address not in owned:
            counts[_NVME, UNUSABLE if controller.fault or controller.driver != _NVME else FREE] += 1
    return counts


def count_vfs(
    topology: Topology, plans: Mapping[str, Plan], quarantined: Collection[str], policy: Policy
) -> dict[tuple[str, str], int]:
    """VFs of each uplink by use. While none exist, the VFs that the manager would create count."""
    owners: dict[tuple[PciAddress, int], str] = {
        (vf.pf, vf.index): QUARANTINED if name in quarantined else CLAIMED for name, plan in plans.items() for vf in plan.vfs
    }
    counts: dict[tuple[str, str], int] = {}
    for uplink in policy.uplinks:
        pf = topology.find_uplink(uplink)
        if pf is None:
            continue
        in_use = {vf.index: vf.driver == VFIO or bool(vf.use) for vf in pf.vfs}
        in_use = in_use or dict.fromkeys(range(policy.count_vfs(pf)), False)
        uses = Counter(owners.get((pf.address, index), UNMANAGED if used else FREE) for index, used in in_use.items())
        counts.update({(uplink, use): uses[use] for use in _VF_STATES})
    return counts
