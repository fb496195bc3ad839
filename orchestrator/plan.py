"""Which cores, pages and virtual function a guest gets. Pure: request + topology + what is taken → plan, or NoRoom."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from uuid import UUID, uuid5

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import NoRoom, RequestError
from orchestrator.request import GuestRequest
from orchestrator.topology import Core, PhysicalFunction, Topology
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

_NAMESPACE = UUID("4e6f4879-7065-4000-8000-000000000000")

# Locally administered (bit 1 of the first byte, IEEE 802-2014 8.4); "NH" in ASCII, so that a capture shows whose frames they are.
_MAC_PREFIX = "02:4e:48"
_MAC_SUFFIXES = 1 << 24


@dataclass(frozen=True)
class VfPlan:
    """The virtual function of a guest.

    Attributes:
        pf: address of its physical function.
        interface: network interface of the PF.
        index: number of the VF within the PF.
        address: PCI address of the VF.
        mac: Ethernet address that the PF gives the VF.
    """

    pf: PciAddress
    interface: str
    index: int
    address: PciAddress
    mac: MacAddress


@dataclass(frozen=True)
class Plan:
    """Everything a guest owns, with exact ids. Steps, domain XML and ledger all come from this one value.

    Attributes:
        name: the guest.
        cores: the CPUs of each physical core the guest owns; vCPU n runs on the n-th CPU of their concatenation.
        node: NUMA node of cores and memory.
        page_size: huge page size.
        pages: number of huge pages.
        housekeeping: where QEMU's other threads run.
        vf: the network function.
        image: name of the guest image.
        cmdline: words for the guest's kernel command line (address included).
    """

    name: str
    cores: tuple[CpuSet, ...]
    node: int
    page_size: Size
    pages: int
    housekeeping: CpuSet
    vf: VfPlan
    image: str
    cmdline: str

    @property
    def cpus(self) -> tuple[int, ...]:
        """Host CPU of each vCPU, in vCPU order."""
        return tuple(cpu for core in self.cores for cpu in core)

    @property
    def uuid(self) -> UUID:
        """libvirt's id of the guest: made from what only ours of this name has, so that no stranger's is taken for it."""
        return uuid5(_NAMESPACE, f"{self.name} {self.vf.mac}")

    @property
    def memory(self) -> Size:
        """The guest's memory."""
        return Size(self.page_size.bytes * self.pages)

    def to_json(self) -> dict[str, object]:
        """The plan as plain JSON types."""
        return {
            "name": self.name,
            "cores": [str(core) for core in self.cores],
            "node": self.node,
            "page_size": str(self.page_size),
            "pages": self.pages,
            "housekeeping": str(self.housekeeping),
            "vf": {
                "pf": str(self.vf.pf),
                "interface": self.vf.interface,
                "index": self.vf.index,
                "address": str(self.vf.address),
                "mac": str(self.vf.mac),
            },
            "image": self.image,
            "cmdline": self.cmdline,
        }


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _StoredVf(_Stored):
    pf: str
    interface: str
    index: int
    address: str
    mac: str


class _StoredPlan(_Stored):
    name: str
    cores: list[str]
    node: int
    page_size: str
    pages: int
    housekeeping: str
    vf: _StoredVf
    image: str
    cmdline: str


def plan_from_json(fields: dict[str, object]) -> Plan:
    """Reads back what ``Plan.to_json`` wrote.

    Raises:
        ValueError: the fields are not those of a plan.
    """
    try:
        stored = _StoredPlan.model_validate(fields)
        vf = stored.vf
        return Plan(
            name=stored.name,
            cores=tuple(map(CpuSet.parse, stored.cores)),
            node=stored.node,
            page_size=Size.parse(stored.page_size),
            pages=stored.pages,
            housekeeping=CpuSet.parse(stored.housekeeping),
            vf=VfPlan(
                pf=PciAddress.parse(vf.pf),
                interface=vf.interface,
                index=vf.index,
                address=PciAddress.parse(vf.address),
                mac=MacAddress.parse(vf.mac),
            ),
            image=stored.image,
            cmdline=stored.cmdline,
        )
    except RequestError as error:
        raise ValueError(error.message) from None


@dataclass(frozen=True)
class Policy:
    """What the operator has decided for the whole host.

    Attributes:
        housekeeping: CPUs of the manager, of the kernel's threads and of QEMU's other threads; never a guest's.
        uplinks: network interfaces of the PFs whose VFs guests may get, the preferred first.
        page_size: huge page size of guest memory.
        vfs_per_uplink: how many VFs an uplink may have at the most; None for as many as it can.
    """

    housekeeping: CpuSet
    uplinks: tuple[str, ...]
    page_size: Size
    vfs_per_uplink: int | None = None

    def count_vfs(self, pf: PhysicalFunction) -> int:
        """How many VFs to make on a PF that has none yet."""
        return pf.total_vfs if self.vfs_per_uplink is None else min(self.vfs_per_uplink, pf.total_vfs)


@dataclass(frozen=True)
class PageClaim:
    """Huge pages of one size that guests own on one node; the pool may still show the ``unused`` among them as free, as their
    guests have not been started yet."""

    node: int
    page_size: Size
    owned: int
    unused: int


@dataclass(frozen=True)
class Claims:
    """What guests own already."""

    cpus: CpuSet = CpuSet()
    vfs: frozenset[PciAddress] = frozenset()
    macs: frozenset[MacAddress] = frozenset()
    pages: tuple[PageClaim, ...] = ()

    @classmethod
    def of(cls, plans: Iterable[Plan], started: frozenset[str]) -> Claims:
        """Adds up the claims of all guests.

        Args:
            plans: plans of all guests that hold a claim.
            started: names of those whose pages the pool shows as used (QEMU takes them all before it runs: immediate
                allocation). Read this *before* the topology is surveyed: a guest that starts in between is then counted
                twice for a moment, which refuses too much, but never missed.
        """
        plans = tuple(plans)
        owned: Counter[tuple[int, Size]] = Counter()
        unused: Counter[tuple[int, Size]] = Counter()
        for plan in plans:
            owned[plan.node, plan.page_size] += plan.pages
            unused[plan.node, plan.page_size] += 0 if plan.name in started else plan.pages
        return cls(
            cpus=CpuSet.of(cpu for plan in plans for cpu in plan.cpus),
            vfs=frozenset(plan.vf.address for plan in plans),
            macs=frozenset(plan.vf.mac for plan in plans),
            pages=tuple(PageClaim(node, size, count, unused[node, size]) for (node, size), count in sorted(owned.items())),
        )


def plan_guest(request: GuestRequest, topology: Topology, taken: Claims, policy: Policy) -> Plan:
    """Chooses whole physical cores, huge pages of the same node, and a VF; the same input gives the same plan.

    The node of the VF's PF is preferred, then the node with the fewest cores left over, then the uplink named first,
    then the lower node. Cores are the lowest that are free; if the kernel isolates some CPUs, only these.

    Raises:
        RequestError: the memory is no whole number of huge pages.
        NoRoom: with a reason for each NUMA node and each uplink that was refused.
    """
    pages = _count_pages(request.size, policy.page_size)
    refused: list[str] = [] if policy.uplinks else ["network: no uplink is configured"]
    vfs: list[tuple[PhysicalFunction, int]] = []
    for uplink in policy.uplinks:
        found = _find_vf(uplink, topology, taken, policy)
        refused.append(found) if isinstance(found, str) else vfs.append(found)
    places: list[_Place] = []
    for node in sorted({core.node for core in topology.cores}):
        place, lacks = _find_cores(request.cores, node, topology, taken, policy)
        lacks += _check_pages(pages, node, topology, taken, policy.page_size)
        refused.append(f"node {node}: {'; '.join(lacks)}") if lacks else places.append(place)
    if not vfs or not places:
        wanted = f"{request.cores} whole cores, {pages} huge pages of {policy.page_size}, a VF"
        hint = "`nohype survey` shows what the host has, `nohype guest list` who owns it"
        raise NoRoom(f"no room for guest {request.name!r} ({wanted})", tuple(refused), hint)
    # min() keeps the first of equals, and both lists are in order of preference.
    (pf, index), place = min(product(vfs, places), key=lambda pair: (pair[0][0].node not in (None, pair[1].node), pair[1].left))
    mac = _choose_mac(f"{pf.mac} {request.name}", taken.macs | {other.mac for other in topology.pfs if other.mac})
    address = f"nohype.address={request.address}" if request.address else ""
    return Plan(
        name=request.name,
        cores=place.cores,
        node=place.node,
        page_size=policy.page_size,
        pages=pages,
        housekeeping=policy.housekeeping,
        vf=VfPlan(pf.address, pf.interface or "", index, pf.vf_address(index), mac),
        image=request.image,
        cmdline=" ".join(filter(None, (request.cmdline, address))),
    )


@dataclass(frozen=True)
class _Place:
    """Cores of one node that a guest could get, and how many usable ones would stay behind."""

    node: int
    cores: tuple[CpuSet, ...]
    left: int


def _count_pages(memory: Size, page_size: Size) -> int:
    pages, rest = divmod(memory.bytes, page_size.bytes)
    if rest:
        good = [str(Size(count * page_size.bytes)) for count in (pages, pages + 1) if count]
        raise RequestError(f"memory {memory} is no multiple of the huge page size {page_size}", f"use {' or '.join(good)}")
    return pages


def _find_cores(count: int, node: int, topology: Topology, taken: Claims, policy: Policy) -> tuple[_Place, list[str]]:
    """A place on the node, and what is lacking if there are too few cores."""
    of_node = sorted((core for core in topology.cores if core.node == node), key=lambda core: min(core.cpus.ids))
    usable = [core for core in of_node if not _why_not(core, topology, taken, policy)]
    # A guest's topology has one SMT width, so cores of different width (a sibling is offline, hybrid CPUs) are not mixed.
    for width in sorted({len(core.cpus) for core in usable}, reverse=True):
        alike = tuple(core.cpus for core in usable if len(core.cpus) == width)
        if len(alike) >= count:
            return _Place(node, alike[:count], len(usable) - count), []
    unusable = ", ".join(f"cpus {core.cpus} {why}" for core in of_node if (why := _why_not(core, topology, taken, policy)))
    same = " with the same number of threads" if len(usable) >= count else ""
    lack = f"{len(usable)} of {len(of_node)} whole cores are free, {count} are wanted{same}"
    return _Place(node, (), 0), [lack + (f" ({unusable})" if unusable else "")]


def _why_not(core: Core, topology: Topology, taken: Claims, policy: Policy) -> str:
    if core.cpus & policy.housekeeping:
        return "are housekeeping"
    if core.cpus & taken.cpus:
        return "are a guest's"
    if topology.isolated and not core.cpus <= topology.isolated:
        return "are not isolated"
    return ""


def _check_pages(pages: int, node: int, topology: Topology, taken: Claims, page_size: Size) -> list[str]:
    pool = next((pool for pool in topology.pools if (pool.node, pool.page_size) == (node, page_size)), None)
    if not pool or not pool.total:
        return [f"it has no huge pages of {page_size}"]
    claim = next((claim for claim in taken.pages if (claim.node, claim.page_size) == (node, page_size)), None)
    owned, unused = (claim.owned, claim.unused) if claim else (0, 0)
    # What the pool shows as free, less what guests will still take from it. The second bound holds even if `unused` is too
    # small, as for a guest that has ended and still holds its claim: what is owned is never given twice.
    free = max(0, min(pool.free - unused, pool.total - owned))
    if free >= pages:
        return []
    return [f"{free} of {pool.total} huge pages of {page_size} are free, {pages} are wanted"]


def _find_vf(uplink: str, topology: Topology, taken: Claims, policy: Policy) -> tuple[PhysicalFunction, int] | str:
    """The uplink's PF with the number of a free VF, or why there is none."""
    pf = next((pf for pf in topology.pfs if pf.interface == uplink), None)
    if not pf:
        return f"uplink {uplink}: there is no SR-IOV capable network interface of this name"
    if not topology.iommu_groups:
        return f"uplink {uplink}: the host has no IOMMU in use (firmware setting; boot with intel_iommu=on on Intel)"
    if not pf.up:
        return f"uplink {uplink}: the PF {pf.address} is down or has no carrier"
    # The kernel refuses to change sriov_numvfs between two numbers above 0 (drivers/pci/iov.c: EBUSY), and going through 0
    # would take other guests' VFs away. So if VFs exist, these are all there are.
    exist = {vf.index: vf for vf in pf.vfs}
    strangers: list[str] = []
    for index in sorted(exist) or range(policy.count_vfs(pf)):
        if pf.vf_address(index) in taken.vfs:
            continue
        stranger = _check_group(pf.vf_address(index), topology) if exist else ""
        if not stranger:
            return pf, index
        strangers.append(stranger)
    count = f"{len(exist)} (of {pf.total_vfs} possible)" if exist else str(policy.count_vfs(pf))
    return f"uplink {uplink}: no VF is left of {count}" + "".join(f"; {stranger}" for stranger in strangers)


def _check_group(address: PciAddress, topology: Topology) -> str:
    group = next((group for group in topology.iommu_groups if address in group.devices), None)
    if not group:
        return f"VF {address} is in no IOMMU group"
    others = ", ".join(str(device) for device in group.devices if device != address)
    return f"VF {address} shares IOMMU group {group.number} with {others}" if others else ""


def _choose_mac(seed: str, used: frozenset[MacAddress]) -> MacAddress:
    """An unused address; the seed makes hosts on one network differ, and a guest keep its address when it comes back."""
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:3], "big")
    for step in range(_MAC_SUFFIXES):
        suffix = f"{(start + step) % _MAC_SUFFIXES:06x}"
        mac = MacAddress(f"{_MAC_PREFIX}:{suffix[:2]}:{suffix[2:4]}:{suffix[4:]}")
        if mac not in used:
            return mac
    raise NoRoom("no Ethernet address is left", (f"all of {_MAC_PREFIX}:* are taken",))
