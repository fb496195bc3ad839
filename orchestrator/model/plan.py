"""The values of planning: plan, allocated resources, and the operator's policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from uuid import UUID, uuid5

from orchestrator.model.cache import CachePlan
from orchestrator.model.edge import EdgeMode
from orchestrator.model.exit_policy import ExitPolicies
from orchestrator.model.plain import from_plain
from orchestrator.model.target import parse_target
from orchestrator.model.topology import PhysicalFunction
from orchestrator.model.waiver import Waiver
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

_NAMESPACE = UUID("4e6f4879-7065-4000-8000-000000000000")
_NIL = UUID(int=0)


@dataclass(frozen=True)
class VfPlan:
    """A VF of a guest, identified by ``pf`` and ``index``. Other fields are as in NicPlan."""

    pf: PciAddress
    interface: str
    index: int
    address: PciAddress
    mac: MacAddress
    vlan: int = 0
    rate: int = 0


@dataclass(frozen=True)
class NicPlan:
    """A NIC of a guest: a VF or, with a software edge, a virtio NIC that a tap of the host serves."""

    pf: PciAddress | None  # None with a software edge
    interface: str  # the uplink at planning time; it may be renamed later
    index: int | None  # number of the VF within its PF
    address: PciAddress | None  # of the VF; provisional for a VF that is not created yet
    mac: MacAddress
    edge: EdgeMode = EdgeMode.VEPA
    network: str = ""  # the tenant network; empty for none
    vlan: int = 0  # port VLAN, 0 for none
    rate: int = 0  # limit for sending in Mbit/s, 0 for none
    tap: str = ""  # the host's interface for a NIC of a software edge
    switch_vlan: int = 0  # with edge mode channel: the VLAN that the switch translates ``vlan`` to, 0 for untagged frames

    @property
    def network_vlan(self) -> int:
        """The VLAN of its network, 0 for none."""
        return self.switch_vlan if self.edge is EdgeMode.CHANNEL else self.vlan

    @property
    def vf(self) -> VfPlan | None:
        """None with a software edge."""
        if self.pf is None or self.index is None or self.address is None:
            return None
        return VfPlan(self.pf, self.interface, self.index, self.address, self.mac, self.vlan, self.rate)


@dataclass(frozen=True)
class DiskPlan:
    """A disk of a guest: the NVMe controller with this serial number, an emulated disk's file or logical volume, or a target."""

    size: Size  # of the namespace, file or volume; 0 for a network disk, which the host cannot see
    serial: str = ""
    address: PciAddress | None = None  # None unless it is an NVMe controller
    node: int | None = None  # NUMA node of the controller, None if not known
    file: str = ""  # absolute, of a volume its path in /dev; empty unless the disk is emulated
    target: str = ""  # URL of a network disk, otherwise empty
    group: str = ""  # the LVM volume group; empty if the disk is not a logical volume

    @property
    def key(self) -> str:
        """Identifies the disk on this host, also after its PCI address has changed."""
        return self.file or self.serial or (parse_target(self.target).key if self.target else "")


@dataclass(frozen=True)
class ImageRef:
    """A build of a guest image. ``hash`` is empty if any build will do, as for guests of earlier versions."""

    name: str
    hash: str = ""


@dataclass(frozen=True)
class Plan:
    """The resources of a guest as exact ids, from which steps, domain XML and ledger are derived."""

    name: str
    cores: tuple[CpuSet, ...]  # the CPUs of each physical core; vCPU n runs on the n-th CPU of their concatenation
    node: int  # NUMA node of cores and memory
    page_size: Size
    pages: int
    nics: tuple[NicPlan, ...]  # at least one, except while only disks are left
    image: ImageRef
    cmdline: str  # words for the guest's kernel command line, addresses included
    cpu_features: tuple[str, ...] = ()  # CPU features that QEMU passes to the guest only by name
    uuid: UUID = _NIL  # libvirt's id of the guest; nil until the plan is claimed
    disks: tuple[DiskPlan, ...] = ()
    iommu: bool = True  # the host uses an IOMMU
    caches: CachePlan | None = None  # None if the request limits none

    @cached_property
    def cpus(self) -> tuple[int, ...]:
        """Host CPU of each vCPU, in vCPU order."""
        return tuple(cpu for core in self.cores for cpu in core)

    @property
    def vf(self) -> NicPlan:
        """The first NIC."""
        return self.nics[0]

    @property
    def vfs(self) -> tuple[VfPlan, ...]:
        """The NICs that are VFs."""
        return tuple(vf for nic in self.nics if (vf := nic.vf))

    @property
    def channels(self) -> tuple[tuple[PciAddress, int], ...]:
        """PF and VLAN of each NIC of the edge mode channel: no other NIC of the PF has the VLAN."""
        return tuple((nic.pf, nic.vlan) for nic in self.nics if nic.pf and nic.edge is EdgeMode.CHANNEL)

    @property
    def software_nics(self) -> tuple[NicPlan, ...]:
        """The NICs whose frames the host's kernel forwards."""
        return tuple(nic for nic in self.nics if nic.edge.is_software)

    @property
    def memory(self) -> Size:
        return Size(self.page_size.bytes * self.pages)

    @property
    def controllers(self) -> tuple[DiskPlan, ...]:
        """The disks that are NVMe controllers."""
        return tuple(disk for disk in self.disks if disk.address)

    @property
    def waived(self) -> tuple[Waiver, ...]:
        """Properties that the guest lacks, as its request or the host's policy has accepted."""
        found = {
            Waiver.EMULATED_DISK: any(disk.file for disk in self.disks),
            Waiver.SOFTWARE_EDGE: bool(self.software_nics),
            Waiver.NO_IOMMU: not self.iommu,
            Waiver.SHARED_CACHE: bool(self.caches and self.caches.waived),
        }
        return tuple(waiver for waiver, lacks in found.items() if lacks)

    def only_disks(self) -> Plan:
        """What the guest still owns while its disks are wiped: no network disk, which the host does not reach."""
        disks = tuple(disk for disk in self.disks if not disk.target)
        return replace(self, cores=(), pages=0, nics=(), cpu_features=(), disks=disks, caches=None)

    def claimed(self, number: int, image: ImageRef) -> Plan:
        """``number`` of the claim is unique, so no two guests ever have the same UUID."""
        return replace(self, image=image, uuid=_make_uuid(self, number))


def _make_uuid(plan: Plan, number: int) -> UUID:
    return uuid5(_NAMESPACE, f"{plan.name} {plan.vf.mac}" + (f" {number}" if number else ""))


def plan_from_json(fields: dict[str, object]) -> Plan:
    """Reads what ``to_plain`` returned for a plan. Raises ValueError with the path of a wrong field.

    Earlier versions stored one ``vf``, the image's name alone, ``housekeeping``, and the claim's number as ``serial``, from which
    they computed the UUID.
    """
    if "vf" not in fields:
        plan = from_plain(Plan, fields)
        if not plan.nics and not plan.disks:
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
class BootPolicy:
    """Which boot files the manager downloads for guests. Tenants have servers of their own (``Identity.boot_servers``)."""

    servers: tuple[str, ...] = ()  # URLs of folders, for operators
    max_size: int = 0  # bytes of kernel and initrd together
    timeout: float = 0.0  # seconds for both
    tenants: int = 0  # number of tenants that may boot from servers


@dataclass(frozen=True)
class Policy:
    """The operator's configuration of the host."""

    housekeeping: CpuSet  # CPUs for the manager, kernel threads and QEMU's helper threads
    uplinks: tuple[str, ...]  # interfaces of PFs whose VFs guests may get, the preferred first
    page_size: Size  # for guests that request none
    vfs_per_uplink: int | None = None  # maximum number of VFs of an uplink; None for the PF's maximum
    reserved_pages: tuple[tuple[Size, int], ...] = ()  # (huge page size, pages on each node) for the host itself
    boot: BootPolicy = BootPolicy()
    disk_serials: frozenset[str] = frozenset()  # NVMe controllers whose contents may be destroyed
    disk_folder: str = ""  # for the files of emulated disks; empty if the host offers none
    accept: tuple[Waiver, ...] = ()  # properties that every guest may lack
    edges: tuple[tuple[str, EdgeMode], ...] = ()  # (uplink, the edge mode that it must have); the manager chooses for the others
    vlans: Mapping[str, frozenset[int]] = field(default_factory=dict)  # uplink → VLANs of networks that it carries; others: all
    tenants: frozenset[str] = frozenset()  # that can own networks
    disk_group: str = ""  # LVM volume group for emulated disks, instead of the folder
    channels: Mapping[str, frozenset[int]] = field(default_factory=dict)  # uplink → VLANs for the edge mode channel
    exit_policies: ExitPolicies = ExitPolicies()
    tied: frozenset[str] = frozenset()  # uplinks whose switch port is configured

    def count_vfs(self, pf: PhysicalFunction) -> int:
        """The number of VFs to create on a PF that has none."""
        return pf.total_vfs if self.vfs_per_uplink is None else min(self.vfs_per_uplink, pf.total_vfs)

    def reserved(self, page_size: Size) -> int:
        return sum(count for size, count in self.reserved_pages if size == page_size)


@dataclass(frozen=True)
class AllocatedPages:
    """Huge pages of one size that guests own on one node."""

    node: int
    page_size: Size
    owned: int
    unused: int  # pages that the pool may show as free, since their guests are not started
    starting: int = 0  # unused pages of starting guests: the kernel may have promised them (PromisedPages)


@dataclass(frozen=True)
class Allocated:
    """Resources that guests own or unmanaged domains use.

    Attributes:
        last_cpus: CPU that an unmanaged domain may use later → why guests get it last.
        last_vfs: VF that an unmanaged domain may use later → why guests get it last.
    """

    cpus: CpuSet = CpuSet()
    vfs: frozenset[PciAddress] = frozenset()
    numbers: frozenset[tuple[PciAddress, int]] = frozenset()  # VFs by PF and number, which stay when addresses change
    macs: frozenset[MacAddress] = frozenset()
    disks: frozenset[str] = frozenset()  # keys of disks, and PCI addresses of controllers
    pages: tuple[AllocatedPages, ...] = ()
    channels: frozenset[tuple[PciAddress, int]] = frozenset()  # VLANs of the edge mode channel, by PF
    caches: Mapping[str, CachePlan] = field(default_factory=dict)  # guest → its part of the caches
    pinned: Mapping[int, str] = field(default_factory=dict)  # CPU → why no guest gets it
    last_cpus: Mapping[int, str] = field(default_factory=dict)
    last_vfs: Mapping[PciAddress, str] = field(default_factory=dict)
