"""What a guest gets, what guests have already, and what the operator has decided: the values that planning is about.

`planner` makes plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from uuid import UUID, uuid5

from orchestrator.model.plain import from_plain
from orchestrator.model.topology import PhysicalFunction
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

_NAMESPACE = UUID("4e6f4879-7065-4000-8000-000000000000")
_NIL = UUID(int=0)


@dataclass(frozen=True)
class NicPlan:
    """A virtual function of a guest.

    Attributes:
        pf: address of its physical function.
        interface: network interface of the PF when the plan was made. It may have been renamed since: find it by ``pf``.
        index: number of the VF within the PF.
        address: PCI address of the VF, provisional in a plan for VFs that are not created yet; a claim is for one that exists.
        mac: Ethernet address that the PF gives the VF.
    """

    pf: PciAddress
    interface: str
    index: int
    address: PciAddress
    mac: MacAddress


@dataclass(frozen=True)
class ImageRef:
    """A build of a guest image.

    Attributes:
        hash: of what it was built from; empty if any build will do, as for guests of earlier versions.
    """

    name: str
    hash: str = ""


@dataclass(frozen=True)
class Plan:
    """What a guest owns, as exact ids: steps, domain XML and ledger all come from this one value.

    Attributes:
        cores: the CPUs of each physical core; vCPU n runs on the n-th CPU of their concatenation.
        node: NUMA node of cores and memory.
        pages: number of huge pages.
        nics: at least one.
        cmdline: words for the guest's kernel command line, addresses included.
        cpu_features: CPU features that the guest must be given by name, since QEMU passes them on in no other way.
        uuid: libvirt's id of the guest; nil until the plan is claimed.
    """

    name: str
    cores: tuple[CpuSet, ...]
    node: int
    page_size: Size
    pages: int
    nics: tuple[NicPlan, ...]
    image: ImageRef
    cmdline: str
    cpu_features: tuple[str, ...] = ()
    uuid: UUID = _NIL

    @cached_property
    def cpus(self) -> tuple[int, ...]:
        """Host CPU of each vCPU, in vCPU order."""
        return tuple(cpu for core in self.cores for cpu in core)

    @property
    def vf(self) -> NicPlan:
        """The first NIC."""
        return self.nics[0]

    @property
    def memory(self) -> Size:
        """The guest's memory."""
        return Size(self.page_size.bytes * self.pages)

    def claimed(self, number: int, image: ImageRef) -> Plan:
        """The plan of a claim.

        Args:
            number: of the claim. No two claims have the same, so that no two guests ever have the same UUID.
        """
        return replace(self, image=image, uuid=_make_uuid(self, number))


def _make_uuid(plan: Plan, number: int) -> UUID:
    return uuid5(_NAMESPACE, f"{plan.name} {plan.vf.mac}" + (f" {number}" if number else ""))


def plan_from_json(fields: dict[str, object]) -> Plan:
    """Reads what ``to_plain`` returned for a plan, in this version or in an earlier one.

    Earlier versions stored one ``vf``, the image's name alone, ``housekeeping``, and the claim's number as ``serial``, of which
    they computed the UUID.

    Raises:
        ValueError: the fields are not those of a plan; with the path of the field.
    """
    if "vf" not in fields:
        plan = from_plain(Plan, fields)
        if not plan.nics:
            raise ValueError("nics: empty")
        return plan
    fields = {"serial": 0, **fields}
    serial = fields.pop("serial")
    if type(serial) is not int:
        raise ValueError("serial: not of type int")
    fields |= {"nics": [fields.pop("vf")], "image": {"name": fields.get("image")}}
    fields.pop("housekeeping", None)
    plan = from_plain(Plan, fields)
    return replace(plan, uuid=_make_uuid(plan, serial))


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
        nics = [nic for plan in plans for nic in plan.nics]
        owned: Counter[tuple[int, Size]] = Counter()
        unused: Counter[tuple[int, Size]] = Counter()
        begun: Counter[tuple[int, Size]] = Counter()
        for plan in plans:
            owned[plan.node, plan.page_size] += plan.pages
            unused[plan.node, plan.page_size] += 0 if plan.name in started else plan.pages
            begun[plan.node, plan.page_size] += plan.pages if plan.name in starting and plan.name not in started else 0
        return cls(
            cpus=CpuSet.of(cpu for plan in plans for cpu in plan.cpus),
            vfs=frozenset(nic.address for nic in nics),
            numbers=frozenset((nic.pf, nic.index) for nic in nics),
            macs=frozenset(nic.mac for nic in nics),
            pages=tuple(
                PageClaim(node, size, count, unused[node, size], begun[node, size])
                for (node, size), count in sorted(owned.items())
            ),
        )
