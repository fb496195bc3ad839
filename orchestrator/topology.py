"""What a host has, as values. Pure: nothing here reads the host; `host.survey` fills these in."""

from __future__ import annotations

from dataclasses import dataclass

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
class VirtualFunction:
    """An SR-IOV virtual function that exists now.

    Attributes:
        index: the VF's number within its PF (``virtfnN``).
        driver: bound driver, None if unbound.
        iommu_group: group number now; None without an IOMMU. Never store it: it changes across reboots.
    """

    address: PciAddress
    index: int
    driver: str | None
    iommu_group: int | None


@dataclass(frozen=True)
class PhysicalFunction:
    """An SR-IOV capable NIC function (Documentation/PCI/pci-iov-howto.rst).

    Attributes:
        interface: its network interface, None while no network driver is bound.
        device: vendor and device id, ``8086:10c9``.
        node: NUMA node, None where the firmware does not say (sysfs shows -1).
        up: administratively up *and* carrier present.
        total_vfs: how many VFs the device can have.
        first_vf_offset, vf_stride: routing id arithmetic of the SR-IOV capability; they give a VF's address before it exists.
        vfs: the VFs that exist now.
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

    def vf_address(self, index: int) -> PciAddress:
        """The PCI address that VF number ``index`` has or will have."""
        return self.address.offset(self.first_vf_offset + index * self.vf_stride)


@dataclass(frozen=True)
class IommuGroup:
    """An IOMMU group and its default domain's type (ABI: sysfs-kernel-iommu_groups): DMA, DMA-FQ, identity, ..."""

    number: int
    type: str
    devices: tuple[PciAddress, ...]


@dataclass(frozen=True)
class Topology:
    """A host as it was when it was surveyed.

    Attributes:
        cores: all physical cores that are online, in CPU order.
        isolated: CPUs that the kernel keeps out of load balancing (``isolcpus=domain`` or isolated cpusets).
    """

    cores: tuple[Core, ...]
    isolated: CpuSet
    pools: tuple[PagePool, ...]
    pfs: tuple[PhysicalFunction, ...]
    iommu_groups: tuple[IommuGroup, ...]

    @property
    def cpus(self) -> CpuSet:
        """All online CPUs."""
        return CpuSet.of(cpu for core in self.cores for cpu in core.cpus)

    def siblings(self, cpus: CpuSet) -> CpuSet:
        """The given CPUs and everything that shares a physical core with them."""
        return CpuSet.of(cpu for core in self.cores if core.cpus & cpus for cpu in core.cpus)
