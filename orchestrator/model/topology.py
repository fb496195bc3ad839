"""The survey of a host as values, which `host.survey` and `host.netlink` fill in. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.model.cache import CacheSurvey
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size


@dataclass(frozen=True)
class Core:
    """A physical core (Documentation/admin-guide/cputopology.rst)."""

    cpus: CpuSet  # the online SMT siblings
    socket: int
    node: int


@dataclass(frozen=True)
class PagePool:
    """Persistent huge pages of one size on one node, in pages (Documentation/admin-guide/mm/hugetlbpage.rst)."""

    node: int
    page_size: Size
    total: int
    free: int


@dataclass(frozen=True)
class PromisedPages:
    """Huge pages that the kernel has reserved for mappings, on any node, and that pools still count as free."""

    page_size: Size
    count: int


@dataclass(frozen=True)
class VirtualFunction:
    """An existing SR-IOV virtual function."""

    address: PciAddress
    index: int  # number within its PF (`virtfnN`)
    driver: str | None
    iommu_group: int | None  # None without an IOMMU. Must not be stored: it changes across reboots
    use: str = ""  # how the host uses it, empty if it does not; a guest cannot get a VF in use


@dataclass(frozen=True)
class Port:
    """A network interface of a PCI function."""

    name: str
    up: bool  # administratively up with carrier
    mac: MacAddress | None  # None without a unicast Ethernet address
    fault: str = ""  # why it cannot be an uplink, empty if it can
    representor: bool = False  # represents the port of another function, in switchdev mode


@dataclass(frozen=True)
class PhysicalFunction:
    """An SR-IOV capable NIC function (Documentation/PCI/pci-iov-howto.rst)."""

    address: PciAddress
    interface: str | None  # its own interface in the current network namespace; if None, `fault` has the reason
    device: str  # vendor and device id, "8086:10c9"
    driver: str | None
    node: int | None  # None if the firmware does not report it (sysfs shows -1)
    up: bool  # administratively up with carrier
    mac: MacAddress | None
    total_vfs: int  # the maximum
    # Routing id arithmetic of the SR-IOV capability. Both can change with the number of VFs, and are unused without VFs (SR-IOV
    # 1.1, 3.3.10 and 3.3.11): addresses that follow from them are then provisional.
    first_vf_offset: int
    vf_stride: int
    vfs: tuple[VirtualFunction, ...]
    fault: str = ""  # why guests cannot get its VFs, empty if they can
    siblings: tuple[Port, ...] = ()  # its other interfaces: further ports, representors

    def at(self, interface: str) -> PhysicalFunction | None:
        """The PF with this interface as its own; None if it does not have the interface."""
        if self.interface == interface:
            return self
        for port in self.siblings:
            if port.name == interface:
                return replace(self, interface=port.name, up=port.up, mac=port.mac, fault=port.fault)
        return None

    def describe_uselessness(self) -> str:
        """The reason why guests cannot get its VFs even with a link; empty if they can."""
        if self.fault:
            return f"PF {self.address}: {self.fault}"
        if self.switchdev:
            legacy = f"devlink dev eswitch set pci/{self.address} mode legacy"
            return f"PF {self.address} is in switchdev mode, but VEPA requires legacy mode ({legacy})"
        if not self.total_vfs:
            return f"PF {self.address} cannot have VFs: enable SR-IOV in the card's firmware settings"
        return ""

    @property
    def is_unknown(self) -> bool:
        """The function has the SR-IOV capability, but what it can do could not be read."""
        return not self.device

    @property
    def switchdev(self) -> bool:
        # By its interfaces: before VFs are created, nothing shows the mode.
        return any(port.representor for port in self.siblings)

    def vf_address(self, index: int) -> PciAddress:
        """The address of an existing or future VF. Raises ValueError while offset or stride are unknown."""
        for vf in self.vfs:
            if vf.index == index:
                return vf.address
        distance = self.first_vf_offset + index * self.vf_stride
        if not self.first_vf_offset or (index and not self.vf_stride):
            raise ValueError(f"the address of VF {index} of PF {self.address} is not known before VFs are created")
        return self.address.offset(distance)

    def tells_addresses(self, count: int) -> bool:
        """Whether `vf_address` works for this many VFs, possibly with provisional addresses."""
        return bool(self.vfs or (self.first_vf_offset and (self.vf_stride or count < 2)))


@dataclass(frozen=True)
class VfState:
    """The settings of a VF that its PF enforces (ip-link(8), include/uapi/linux/if_link.h)."""

    index: int  # number within its PF
    mac: MacAddress | None = None  # None: the VF driver chooses an address
    vlan: int = 0  # port VLAN, 0 for none
    qos: int = 0  # priority of the port VLAN
    min_rate: int = 0  # Mbit/s, 0 for none
    max_rate: int = 0  # Mbit/s, 0 for no limit
    spoof_check: bool | None = True  # send only from the own address; None if the driver does not report it
    trust: bool | None = False  # may change its address and receive all frames; None if the driver does not report it
    link_state: str = "auto"  # "auto" (as the PF's port), "enable" or "disable"

    def with_defaults(self, mac: MacAddress | None = None, vlan: int = 0, max_rate: int = 0) -> VfState:
        """Default VF settings with this address, port VLAN and rate. What the driver does not report stays None."""
        spoof_check = None if self.spoof_check is None else True
        trust = None if self.trust is None else False
        return VfState(self.index, mac, vlan, max_rate=max_rate, spoof_check=spoof_check, trust=trust)

    def diff(self, wanted: VfState) -> dict[str, str]:
        """The differences from `wanted` as text, by attribute."""

        def text(value: object) -> str:
            return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else str(value)

        return {
            name: f"{name.replace('_', ' ')} is {text(value)}, expected {text(vars(wanted)[name])}"
            for name, value in vars(self).items()
            if value != vars(wanted)[name]
        }


@dataclass(frozen=True)
class Link:
    """A network interface."""

    name: str
    index: int
    mac: MacAddress | None  # None without a unicast Ethernet address
    up: bool  # administratively
    carrier: bool
    master: str | None  # the bridge or bond of which it is a port
    kind: str | None  # "bridge", "veth", "tun" ...; None for a physical interface
    parent: str | None = None  # the interface below a macvtap, macvlan or VLAN
    mode: str = ""  # of a macvtap or macvlan: "vepa", "bridge", "private", "passthru"
    mtu: int = 0  # 0 if not known
    all_multicast: bool = False  # administratively
    promiscuous: bool = False  # administratively
    ethernet: bool = True


@dataclass(frozen=True)
class Interface:
    """An Ethernet interface that could be the uplink of a software edge."""

    name: str
    up: bool  # administratively up with carrier
    mac: MacAddress
    master: str | None  # the bridge or bond of which it is a port
    kind: str | None  # "bridge", "veth" ...; None for a physical interface
    node: int | None = None  # NUMA node of its device, None if not known


@dataclass(frozen=True)
class NvmeNamespace:
    """A namespace of an NVMe controller: a block device of the host while the driver nvme is bound."""

    nsid: int  # number within the controller (NVMe base specification 3.2.1)
    device: str  # block device, "nvme0n1". Must not be stored: it changes across reboots and rebinds
    size: Size
    block_size: int  # logical, in bytes


@dataclass(frozen=True)
class NvmeController:
    """An NVMe controller of the PCI bus. It is identified by its serial number and its PCI address."""

    address: PciAddress
    name: str | None  # "nvme0"; None unless the driver nvme is bound. Must not be stored
    serial: str | None  # None unless the driver nvme is bound: no other driver shows it
    model: str | None  # as for the serial number
    node: int | None  # None if the firmware does not report it (sysfs shows -1)
    driver: str | None
    iommu_group: int | None  # None without an IOMMU. Must not be stored: it changes across reboots
    namespaces: tuple[NvmeNamespace, ...] = ()  # in the order of their numbers; empty unless the driver nvme is bound
    fault: str = ""  # why guests cannot get it, empty if they can
    uses: tuple[str, ...] = ()  # how the host uses it, one sentence each
    signatures: tuple[str, ...] = ()  # known contents (file system, partition table, ...), one sentence each

    @property
    def size(self) -> Size:
        """Of all namespaces."""
        return Size(sum(namespace.size.bytes for namespace in self.namespaces))


@dataclass(frozen=True)
class VolumeGroup:
    """The LVM volume group for emulated disks."""

    name: str
    uuid: str  # LVM's id, which never changes
    extent: Size  # logical volumes consist of whole extents
    free: Size
    fault: str = ""  # why guests cannot get volumes of it, empty if they can


@dataclass(frozen=True)
class KernelSetting:
    """A setting that the manager changes while there are guests, as the kernel shows it."""

    name: str
    value: str


@dataclass(frozen=True)
class IommuGroup:
    """An IOMMU group (ABI: sysfs-kernel-iommu_groups)."""

    number: int
    type: str  # of the default domain: DMA, DMA-FQ, identity, ...; empty if it could not be read
    devices: tuple[PciAddress, ...]
    fault: str = ""  # why the group could not be read


@dataclass(frozen=True)
class Topology:
    """The survey of a host."""

    cores: tuple[Core, ...]  # online, in CPU order
    isolated: CpuSet  # excluded from load balancing (`isolcpus=domain` or isolated cpusets)
    pools: tuple[PagePool, ...]
    pfs: tuple[PhysicalFunction, ...]
    iommu_groups: tuple[IommuGroup, ...]
    topoext: bool = False  # AMD's topology extensions: a guest needs the CPU feature of the same name to see SMT threads
    possible: CpuSet = CpuSet()  # CPUs that can be online; empty if not known
    promised: tuple[PromisedPages, ...] = ()
    kvm: bool = True
    vfio: bool = True  # vfio-pci is loaded
    cmdline: str = ""  # of the kernel
    controllers: tuple[NvmeController, ...] = ()  # NVMe
    volume_group: VolumeGroup | None = None  # read only for a guest with emulated disks
    caches: CacheSurvey | None = None  # read only for a guest with a part of the caches
    problems: tuple[str, ...] = ()  # one sentence per value that could not be read and was left out
    interfaces: tuple[Interface, ...] = ()  # in the order of their names
    kernel_settings: tuple[KernelSetting, ...] = ()

    @cached_property
    def cpus(self) -> CpuSet:
        return CpuSet.of(cpu for core in self.cores for cpu in core.cpus.ids)

    @cached_property
    def nodes(self) -> tuple[tuple[int, tuple[Core, ...]], ...]:
        return list_nodes(self.cores)

    @cached_property
    def group_of(self) -> Mapping[PciAddress, IommuGroup]:
        return {device: group for group in self.iommu_groups for device in group.devices}

    def find_uplink(self, uplink: str) -> PhysicalFunction | None:
        return next((found for pf in self.pfs if (found := pf.at(uplink))), None)

    def find_interface(self, name: str) -> Interface | None:
        return next((found for found in self.interfaces if found.name == name), None)

    def siblings(self, cpus: CpuSet) -> CpuSet:
        """All CPUs of the physical cores of these CPUs."""
        return CpuSet.of(cpu for core in self.cores if core.cpus.meets(cpus) for cpu in core.cpus.ids)


def list_nodes(cores: Iterable[Core]) -> tuple[tuple[int, tuple[Core, ...]], ...]:
    """The nodes in order, each with its cores in order; neighbours in a tuple are neighbours on the chip, as far as is known."""
    nodes: dict[int, list[Core]] = {}
    for core in cores:
        nodes.setdefault(core.node, []).append(core)

    def position(core: Core) -> tuple[int, int]:
        return core.socket, min(core.cpus.ids)

    return tuple((node, tuple(sorted(nodes[node], key=position))) for node in sorted(nodes))
