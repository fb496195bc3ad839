"""What a guest gets, what guests have already, and what the operator has decided: the values that planning is about.

`planner` makes plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from uuid import UUID, uuid5

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import RequestError
from orchestrator.model.topology import PhysicalFunction
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

_NAMESPACE = UUID("4e6f4879-7065-4000-8000-000000000000")


@dataclass(frozen=True)
class VfPlan:
    """The virtual function of a guest.

    Attributes:
        pf: address of its physical function.
        interface: network interface of the PF when the plan was made. It may have another name since: find it by ``pf``.
        index: number of the VF within the PF.
        address: PCI address of the VF, provisional in a plan for VFs that are not made yet; a claim is for one that exists.
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
        cpu_features: CPU features that the guest must be given by name, as QEMU passes them on by no other way.
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
    cpu_features: tuple[str, ...] = ()
    serial: int = 0

    @cached_property
    def cpus(self) -> tuple[int, ...]:
        """Host CPU of each vCPU, in vCPU order."""
        return tuple(cpu for core in self.cores for cpu in core)

    @cached_property
    def uuid(self) -> UUID:
        """libvirt's id of the guest: no stranger's, and not that of an earlier guest of ours with the same name and place."""
        return uuid5(_NAMESPACE, f"{self.name} {self.vf.mac}" + (f" {self.serial}" if self.serial else ""))

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
            "cpu_features": list(self.cpu_features),
            "serial": self.serial,
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
    cpu_features: list[str] = []
    serial: int = 0


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
            cpu_features=tuple(stored.cpu_features),
            serial=stored.serial,
        )
    except RequestError as error:
        raise ValueError(error.message) from None


@dataclass(frozen=True)
class Policy:
    """What the operator has decided for the whole host.

    Attributes:
        housekeeping: CPUs of the manager, of the kernel's threads and of QEMU's other threads; never a guest's.
        uplinks: network interfaces of the PFs whose VFs guests may get, the preferred first.
        page_size: huge page size of guests that ask for none.
        vfs_per_uplink: how many VFs an uplink may have at the most; None for as many as it can.
        reserved_pages: (huge page size, pages on each node) that guests do not get: the host's own share.
    """

    housekeeping: CpuSet
    uplinks: tuple[str, ...]
    page_size: Size
    vfs_per_uplink: int | None = None
    reserved_pages: tuple[tuple[Size, int], ...] = ()

    def count_vfs(self, pf: PhysicalFunction) -> int:
        """How many VFs to make on a PF that has none yet."""
        return pf.total_vfs if self.vfs_per_uplink is None else min(self.vfs_per_uplink, pf.total_vfs)

    def reserved(self, page_size: Size) -> int:
        """How many huge pages of a size each node keeps back."""
        return sum(count for size, count in self.reserved_pages if size == page_size)


@dataclass(frozen=True)
class PageClaim:
    """Huge pages of one size that guests own on one node; the pool may still show the ``unused`` among them as free, as their
    guests have not been started yet. Guests that are being started may have ``starting`` of these, and QEMU may have had the
    kernel promise them already (PromisedPages)."""

    node: int
    page_size: Size
    owned: int
    unused: int
    starting: int = 0


@dataclass(frozen=True)
class Claims:
    """What guests own already, and what others use.

    Attributes:
        pinned: CPU that others use → why no guest gets it.
        last_cpus: CPU that others may use later → why guests get it last.
        last_vfs: VF that others may use later → likewise.
    """

    cpus: CpuSet = CpuSet()
    vfs: frozenset[PciAddress] = frozenset()
    numbers: frozenset[tuple[PciAddress, int]] = frozenset()
    """The same VFs by PF and number, which stay when addresses change."""
    macs: frozenset[MacAddress] = frozenset()
    pages: tuple[PageClaim, ...] = ()
    pinned: Mapping[int, str] = field(default_factory=dict)
    last_cpus: Mapping[int, str] = field(default_factory=dict)
    last_vfs: Mapping[PciAddress, str] = field(default_factory=dict)

    @classmethod
    def of(cls, plans: Iterable[Plan], started: frozenset[str], starting: frozenset[str] = frozenset()) -> Claims:
        """Adds up the claims of all guests.

        Args:
            plans: plans of all guests that hold a claim.
            started: names of those whose pages the pool shows as used (QEMU takes them all before it runs: immediate
                allocation). Read this *before* the topology is surveyed: a guest that starts in between is then counted
                twice for a moment, which refuses too much, but never missed.
            starting: names of those, of the others, that are being started.
        """
        plans = tuple(plans)
        owned: Counter[tuple[int, Size]] = Counter()
        unused: Counter[tuple[int, Size]] = Counter()
        begun: Counter[tuple[int, Size]] = Counter()
        for plan in plans:
            owned[plan.node, plan.page_size] += plan.pages
            unused[plan.node, plan.page_size] += 0 if plan.name in started else plan.pages
            begun[plan.node, plan.page_size] += plan.pages if plan.name in starting and plan.name not in started else 0
        return cls(
            cpus=CpuSet.of(cpu for plan in plans for cpu in plan.cpus),
            vfs=frozenset(plan.vf.address for plan in plans),
            numbers=frozenset((plan.vf.pf, plan.vf.index) for plan in plans),
            macs=frozenset(plan.vf.mac for plan in plans),
            pages=tuple(
                PageClaim(node, size, count, unused[node, size], begun[node, size])
                for (node, size), count in sorted(owned.items())
            ),
        )
