"""What the proofs need to read of the live host beyond the survey: devices, address translation, edge modes, services."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.audit.cores import find_suspects
from orchestrator.audit.devices import DeviceState, Translation
from orchestrator.audit.vepa import EdgeReading
from orchestrator.errors import HostError
from orchestrator.host.edge import describe_edge, read_edge_mode
from orchestrator.host.iommu import read_group_name, read_iommu_group, read_unit, read_vfio_devices
from orchestrator.host.pci import is_pf, read_driver
from orchestrator.host.processes import Maps, Thread, read_last_run, read_open_files, read_pagemap
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.topology import Topology
from orchestrator.values import PciAddress

# QEMU hw/i386/pc_q35.c, pc_q35_init(): q35 splits larger RAM around the hole for devices below 4 GiB. (On AMD, with some 1 TiB or
# more, the upper part starts higher still; a real host address is then compared with a wrong guest address.)
_LOW_MEMORY, _SPLIT_FROM, _HIGH_MEMORY = 0x8000_0000, 0xB000_0000, 0x1_0000_0000
_SAMPLES = 512


def read_last_runs(
    host: HostRoot, guests: tuple[RunningGuest, ...], threads: tuple[Thread, ...], topology: Topology
) -> dict[int, float | None]:
    """When the threads ran last whose last CPU alone would speak against them; by thread id."""
    return {thread.tid: read_last_run(host, thread) for thread in find_suspects(guests, threads, topology)}


def read_device(host: HostRoot, guest: RunningGuest, address: PciAddress, open_files: tuple[str, ...]) -> DeviceState:
    """A passed-through function.

    Args:
        open_files: what the guest's QEMU has open.

    Raises:
        HostError: sysfs cannot be read.
    """
    group = read_iommu_group(host, address)
    unit, listed = read_unit(host, address)
    nodes = {f"/dev/vfio/devices/{name}" for name in read_vfio_devices(host, address)}
    nodes |= {f"/dev/vfio/{group.number}"} if group else set()
    return DeviceState(
        address=address,
        driver=read_driver(host, address),
        group=group,
        noiommu=group is not None and read_group_name(host, group.number) == "vfio-noiommu",
        unit=unit,
        listed=listed,
        held=next((path for path in open_files if path in nodes), None),
        physical=is_pf(host, address),
    )


def read_devices(host: HostRoot, guest: RunningGuest) -> tuple[DeviceState, ...]:
    """All functions passed through to a guest."""
    open_files = read_open_files(host, guest.pid)
    return tuple(read_device(host, guest, address, open_files) for address in guest.hostdevs)


def read_translation(host: HostRoot, guest: RunningGuest, maps: Maps) -> Translation | None:
    """Looks up where some pages of the guest's memory, evenly spread, lie on the host.

    Returns:
        None unless the memory is one file of huge pages, as we start guests: otherwise guest addresses are not known.

    Raises:
        HostError: the kernel does not show page frames.
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
    found = read_pagemap(host, guest.pid, tuple(virtual for virtual, _ in pages))
    pairs = [(physical, _guest_address(offset, guest)) for physical, (_, offset) in zip(found, pages, strict=True)]
    present = [(physical, address) for physical, address in pairs if physical is not None]
    return Translation(len(present), sum(physical == address for physical, address in present))


def read_edges(host: HostRoot, guests: Iterable[RunningGuest], topology: Topology) -> tuple[EdgeReading, ...]:
    """The edge mode of each PF that a guest has a VF of. A device that can't be read gives a reading that says so."""
    used = {address for guest in guests for address in guest.hostdevs}
    edges = []
    for pf in topology.pfs:
        if not any(vf.address in used for vf in pf.vfs):
            continue
        name = pf.interface or str(pf.address)
        try:
            edges.append(EdgeReading(name, read_edge_mode(host, pf), describe_edge(host, pf)))
        except HostError as error:
            edges.append(EdgeReading(name, None, error.message))
    return tuple(edges)


def _guest_address(offset: int, guest: RunningGuest) -> int:
    """Guest physical address of an offset in the guest's memory."""
    if guest.memory.bytes < _SPLIT_FROM or offset < _LOW_MEMORY:
        return offset
    return _HIGH_MEMORY + offset - _LOW_MEMORY
