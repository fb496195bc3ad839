"""What a host has, as values. Pure: nothing here reads the host; `host.survey` and `host.netlink` fill these in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.values import CpuSet, MacAddress, PciAddress, Size


@dataclass(frozen=True)
class Core:
    """One physical core with its SMT threads (kernel: Documentation/admin-guide/cputopology.rst).

    Attributes:
        cpus: the core's logical CPUs that are online, all SMT siblings.
        socket: physical package id.
        node: NUMA node id.
    """

    cpus: CpuSet
    socket: int
    node: int


@dataclass(frozen=True)
class PagePool:
    """The persistent huge pages of one size on one NUMA node, in pages (Documentation/mm/hugetlbpage.rst)."""

    node: int
    page_size: Size
    total: int
    free: int


@dataclass(frozen=True)
class PromisedPages:
    """Huge pages of one size, on whatever node, that the kernel has promised to programs and that pools still show as free."""

    page_size: Size
    count: int


@dataclass(frozen=True)
class VirtualFunction:
    """An SR-IOV virtual function that exists now.

    Attributes:
        index: the VF's number within its PF (``virtfnN``).
        driver: bound driver, None if unbound.
        iommu_group: group number now; None without an IOMMU. Never store it: it changes across reboots.
        use: how the host itself uses it, in words; empty if it does not. Such a VF is not a guest's.
    """

    address: PciAddress
    index: int
    driver: str | None
    iommu_group: int | None
    use: str = ""


@dataclass(frozen=True)
class Port:
    """A network interface below a PCI function.

    Attributes:
        up: administratively up *and* carrier present.
        mac: None if it has no unicast Ethernet address.
        fault: why it cannot be an uplink, in words; empty if it can.
        representor: whether it stands for another function's port, as in switchdev mode.
    """

    name: str
    up: bool
    mac: MacAddress | None
    fault: str = ""
    representor: bool = False


@dataclass(frozen=True)
class PhysicalFunction:
    """An SR-IOV capable NIC function (Documentation/PCI/pci-iov-howto.rst).

    Attributes:
        interface: its own network interface in our network namespace, None if there is none; see ``fault``.
        device: vendor and device id, ``8086:10c9``.
        node: NUMA node, None where the firmware does not say (sysfs shows -1).
        up: administratively up *and* carrier present.
        total_vfs: how many VFs the device can have.
        first_vf_offset, vf_stride: routing id arithmetic of the SR-IOV capability. They may change with the number of VFs, and
            are unused while there are none (SR-IOV 1.1, 3.3.10 and 3.3.11): what they give then is provisional.
        vfs: the VFs that exist now.
        fault: why its VFs cannot be guests', in words; empty if they can.
        siblings: further network interfaces below the function: other ports, representors of VFs and subfunctions.
    """

    address: PciAddress
    interface: str | None
    device: str
    driver: str | None
    node: int | None
    up: bool
    mac: MacAddress | None
    total_vfs: int
    first_vf_offset: int
    vf_stride: int
    vfs: tuple[VirtualFunction, ...]
    fault: str = ""
    siblings: tuple[Port, ...] = ()

    def at(self, interface: str) -> PhysicalFunction | None:
        """The PF by this one of its interfaces, None if it has none of this name."""
        if self.interface == interface:
            return self
        for port in self.siblings:
            if port.name == interface:
                return replace(self, interface=port.name, up=port.up, mac=port.mac, fault=port.fault)
        return None

    def describe_uselessness(self) -> str:
        """Why no VF of it can ever be a guest's, whether it has a link or not; empty if one can."""
        if self.fault:
            return f"PF {self.address}: {self.fault}"
        if self.switchdev:
            legacy = f"devlink dev eswitch set pci/{self.address} mode legacy"
            return f"the PF {self.address} is in switchdev mode, and VEPA needs the legacy mode ({legacy})"
        if not self.total_vfs:
            return f"the PF {self.address} can have no VFs: switch SR-IOV on in the card's firmware settings"
        return ""

    @property
    def switchdev(self) -> bool:
        """Whether it is in switchdev mode, as far as its interfaces show: before VFs are made nothing does."""
        return any(port.representor for port in self.siblings)

    def vf_address(self, index: int) -> PciAddress:
        """The PCI address that VF number ``index`` has, or by arithmetic will have.

        Raises:
            ValueError: there are no VFs, and the capability does not tell yet: offset 0 would be the PF itself.
        """
        for vf in self.vfs:
            if vf.index == index:
                return vf.address
        distance = self.first_vf_offset + index * self.vf_stride
        if not self.first_vf_offset or (index and not self.vf_stride):
            raise ValueError(f"PF {self.address} does not tell the address of VF {index} while it has no VFs")
        return self.address.offset(distance)

    def tells_addresses(self, count: int) -> bool:
        """Whether ``vf_address`` is known for this many VFs, be it provisional."""
        return bool(self.vfs or (self.first_vf_offset and (self.vf_stride or count < 2)))


@dataclass(frozen=True)
class VfState:
    """What a PF's driver enforces for one VF (ip-link(8), include/uapi/linux/if_link.h).

    Attributes:
        index: the VF's number within its PF.
        mac: None while none was given (the VF driver then makes one up).
        vlan, qos: port VLAN and its priority, 0 for none.
        min_rate, max_rate: bounds of what the VF may send in Mbit/s, 0 for none.
        spoof_check: whether it may send only from its own address; None where the driver does not tell.
        trust: whether it may change its address and see everybody's frames; None where the driver does not tell.
        link_state: "auto" (as the PF's port), "enable" or "disable".
    """

    index: int
    mac: MacAddress | None = None
    vlan: int = 0
    qos: int = 0
    min_rate: int = 0
    max_rate: int = 0
    spoof_check: bool | None = True
    trust: bool | None = False
    link_state: str = "auto"

    def with_defaults(self, mac: MacAddress | None = None) -> VfState:
        """The same VF as a driver makes a new one, but for its address. What the driver does not tell stays unknown."""
        spoof_check = None if self.spoof_check is None else True
        return VfState(self.index, mac, spoof_check=spoof_check, trust=None if self.trust is None else False)

    def diff(self, wanted: VfState) -> dict[str, str]:
        """What is not as wanted, by attribute, in words."""

        def say(value: object) -> str:
            return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else str(value)

        return {
            name: f"{name.replace('_', ' ')} is {say(value)} in place of {say(vars(wanted)[name])}"
            for name, value in vars(self).items()
            if value != vars(wanted)[name]
        }


@dataclass(frozen=True)
class Link:
    """A network interface.

    Attributes:
        mac: None if it has no Ethernet address, or only zeros.
        up: administratively up; says nothing about the cable.
        carrier: whether the other side is there.
        master: name of the bridge or bond that it is a port of.
        kind: "bridge", "veth", "tun" ...; None for a physical one.
    """

    name: str
    index: int
    mac: MacAddress | None
    up: bool
    carrier: bool
    master: str | None
    kind: str | None


@dataclass(frozen=True)
class IommuGroup:
    """An IOMMU group and its default domain's type (ABI: sysfs-kernel-iommu_groups): DMA, DMA-FQ, identity, ...

    Attributes:
        type: empty if it could not be read.
        fault: why the group could not be read, in words; empty if it could.
    """

    number: int
    type: str
    devices: tuple[PciAddress, ...]
    fault: str = ""


@dataclass(frozen=True)
class Topology:
    """A host as it was when it was surveyed.

    Attributes:
        cores: all physical cores that are online, in CPU order.
        isolated: CPUs that the kernel keeps out of load balancing (``isolcpus=domain`` or isolated cpusets).
        topoext: whether the CPUs tell their SMT threads in AMD's way, for which a guest needs the CPU feature of this name.
        possible: CPUs that can ever be online; empty if that is not known.
        promised: see PromisedPages; sizes of which none are promised are left out.
        kvm: whether the kernel offers KVM.
        vfio: whether the driver vfio-pci is loaded.
        cmdline: the kernel's command line.
        problems: what could not be read, and was left out, a sentence each.
    """

    cores: tuple[Core, ...]
    isolated: CpuSet
    pools: tuple[PagePool, ...]
    pfs: tuple[PhysicalFunction, ...]
    iommu_groups: tuple[IommuGroup, ...]
    topoext: bool = False
    possible: CpuSet = CpuSet()
    promised: tuple[PromisedPages, ...] = ()
    kvm: bool = True
    vfio: bool = True
    cmdline: str = ""
    problems: tuple[str, ...] = ()

    @cached_property
    def cpus(self) -> CpuSet:
        """All online CPUs."""
        return CpuSet.of(cpu for core in self.cores for cpu in core.cpus.ids)

    def find_uplink(self, uplink: str) -> PhysicalFunction | None:
        """The PF by its interface of this name, None if there is none."""
        return next((found for pf in self.pfs if (found := pf.at(uplink))), None)

    def siblings(self, cpus: CpuSet) -> CpuSet:
        """The given CPUs and everything that shares a physical core with them."""
        return CpuSet.of(cpu for core in self.cores if core.cpus.meets(cpus) for cpu in core.cpus.ids)
