"""Reads the devices of a guest for the audit: drivers, IOMMU groups, block devices, and the addresses of its DMA."""

from __future__ import annotations

from orchestrator.audit.disk import DiskState
from orchestrator.audit.nic import DeviceState, Translation
from orchestrator.host.iommu import is_without_iommu, read_group_number, read_iommu_group, read_unit, read_vfio_devices
from orchestrator.host.nvme import find_block_devices
from orchestrator.host.pci import is_idle_nvme, is_nvme, is_pf, read_driver
from orchestrator.host.processes import Maps, read_open_files, read_pagemap
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.values import PciAddress

# QEMU hw/i386/pc_q35.c, pc_q35_init(): q35 splits larger RAM around the hole for devices below 4 GiB. (On AMD, with some 1 TiB or
# more, the upper part starts higher still; a real host address is then compared with a wrong guest address.)
_LOW_MEMORY, _SPLIT_FROM, _HIGH_MEMORY = 0x8000_0000, 0xB000_0000, 0x1_0000_0000
_SAMPLES = 512


def list_vfio_files(host: HostRoot, address: PciAddress) -> frozenset[str]:
    """The files through which a process can use a function: that of its IOMMU group, and its own with iommufd."""
    number = read_group_number(host, address)
    groups = [] if number is None else [f"/dev/vfio/{number}"]
    return frozenset([*groups, *(f"/dev/vfio/devices/{name}" for name in read_vfio_devices(host, address))])


def read_device(host: HostRoot, address: PciAddress, open_files: tuple[str, ...]) -> DeviceState:
    group = read_iommu_group(host, address)
    unit, listed = read_unit(host, address)
    nodes = list_vfio_files(host, address)
    return DeviceState(
        address=address,
        driver=read_driver(host, address),
        group=group,
        noiommu=group is not None and is_without_iommu(host, group.number),
        unit=unit,
        listed=listed,
        vfio_file=next((path for path in open_files if path in nodes), None),
        physical=is_pf(host, address) and not is_idle_nvme(host, address),
    )


def find_controllers(host: HostRoot, guest: RunningGuest) -> tuple[PciAddress, ...]:
    """The NVMe controllers that are passed through to the guest."""
    return tuple(address for address in guest.hostdevs if is_nvme(host, address))


def read_disk(host: HostRoot, device: DeviceState) -> DiskState:
    blocks = find_block_devices(host, device.address)
    return DiskState(device.address, device.driver, device.group, blocks, device.vfio_file)


def read_devices(host: HostRoot, guest: RunningGuest) -> tuple[DeviceState, ...]:
    open_files = read_open_files(host, guest.pid)
    return tuple(read_device(host, address, open_files) for address in guest.hostdevs)


def read_translation(host: HostRoot, guest: RunningGuest, maps: Maps) -> Translation | None:
    """Samples guest pages evenly. Raises HostError if the kernel does not show page frames.

    None unless the memory is one file of huge pages, as the manager launches guests: other guest addresses are unknown.
    """
    pool = [mapping for mapping in maps.mappings if mapping.huge]
    if not pool or len({mapping.path for mapping in pool}) != 1 or sum(m.end - m.start for m in pool) != guest.memory.bytes:
        return None
    pages = [
        (mapping.start + distance, mapping.offset + distance)
        for mapping in pool
        for distance in range(0, mapping.end - mapping.start, mapping.page_size)
    ]
    pages = pages[:: -(-len(pages) // _SAMPLES)]
    frames = read_pagemap(host, guest.pid, tuple(virtual for virtual, _ in pages))
    pairs = [(physical, _guest_address(offset, guest)) for physical, (_, offset) in zip(frames, pages, strict=True)]
    present = [(physical, address) for physical, address in pairs if physical is not None]
    return Translation(len(present), sum(physical == address for physical, address in present))


def _guest_address(offset: int, guest: RunningGuest) -> int:
    """Guest physical address of an offset in the guest's memory."""
    if guest.memory.bytes < _SPLIT_FROM or offset < _LOW_MEMORY:
        return offset
    return _HIGH_MEMORY + offset - _LOW_MEMORY
