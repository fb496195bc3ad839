"""Which cores, pages and virtual function a guest gets. Pure: request + topology + what is taken → plan, or NoRoom."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.values import CpuSet, MacAddress, PciAddress, Size


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
    def memory(self) -> Size:
        """The guest's memory."""
        return Size(self.page_size.bytes * self.pages)
