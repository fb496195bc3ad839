"""Which cores, pages and virtual function a guest gets. Pure: request + topology + what is taken → plan, or NoRoom."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from orchestrator.errors import NoRoom, RequestError
from orchestrator.planning.places import Host, Pages, Place, check_place, find_places
from orchestrator.planning.plan import Claims, Plan, Policy, VfPlan
from orchestrator.request import GuestRequest
from orchestrator.topology import IommuGroup, PhysicalFunction, Topology
from orchestrator.values import MacAddress, PciAddress, Size

# Locally administered (bit 1 of the first byte, IEEE 802-2014 8.4); "NH" in ASCII, so that a capture shows whose frames they are.
_MAC_PREFIX = "02:4e:48"
_MAC_SUFFIXES = 1 << 24
_UPLINK = "uplink "


def plan_guest(request: GuestRequest, topology: Topology, taken: Claims, policy: Policy) -> Plan:
    """Chooses whole physical cores, huge pages of the same node, and a VF; the same input gives the same plan.

    The node of the VF's PF is preferred, then the node with the fewest cores left over, then the one where the cores are
    neighbours, then the one with the fewest pages left over, then the uplink named first, then the lower node. Which of a
    node's cores: see ``find_places``. If the kernel isolates some CPUs, only these.

    A given placement is taken as it is, or refused whole.

    Raises:
        RequestError: the memory is no whole number of huge pages, or the placement has another number of cores than asked for.
        NoRoom: with a reason for each NUMA node and each uplink that was refused, or for each wrong part of the placement.
    """
    page_size = Size.parse(request.page_size) if request.page_size else policy.page_size
    pages = Pages(page_size, _count_pages(request.size, page_size))
    host = Host(topology, taken, policy)
    if request.placement:
        _check_count(request, topology)
        places, no_places = check_place(request.placement.cpu_set, pages, host)
        vfs, no_vfs = _find_vfs(request.placement.vf_address, host)
    else:
        places, no_places = find_places(request.cores, pages, host)
        vfs, no_vfs = _find_vfs(None, host)
    if not vfs or not places:
        hint = "`nohype survey` shows what the host has, `nohype guest list` who owns it"
        raise NoRoom(f"no room for guest {request.name!r} ({_describe(request, pages)})", (*no_vfs, *no_places), hint)
    # min() keeps the first of equals, and both lists are in order of preference.
    vf, place = min(product(vfs, places), key=lambda pair: (pair[0].pf.node not in (None, pair[1].node), pair[1].left))
    return _build_plan(request, pages, place, vf, host)


def hide_vf_owners(error: NoRoom, request: GuestRequest) -> NoRoom:
    """A refusal without the reason why the VF that was asked for can't be had: that it is a guest's, is not there, or is another
    device's is for those who may see the whole host."""
    if not request.placement or not request.placement.vf:
        return error
    reasons = tuple(reason for reason in error.reasons if not reason.startswith(_UPLINK))
    if len(reasons) != len(error.reasons):
        reasons = (f"VF {request.placement.vf} is not available", *reasons)
    return NoRoom(error.message.partition("\n")[0], reasons, error.hint)


@dataclass(frozen=True)
class _Vf:
    """A VF that a guest could get."""

    pf: PhysicalFunction
    index: int
    address: PciAddress


def _build_plan(request: GuestRequest, pages: Pages, place: Place, vf: _Vf, host: Host) -> Plan:
    mac = _choose_mac(f"{vf.pf.mac} {request.name}", host.taken.macs | {pf.mac for pf in host.topology.pfs if pf.mac})
    address = f"nohype.address={request.address}" if request.address else ""
    smt = len(place.cores[0]) > 1
    return Plan(
        name=request.name,
        cores=place.cores,
        node=place.node,
        page_size=pages.size,
        pages=pages.count,
        housekeeping=host.policy.housekeeping,
        vf=VfPlan(vf.pf.address, vf.pf.interface or "", vf.index, vf.address, mac),
        image=request.image,
        cmdline=" ".join(filter(None, (request.cmdline, address))),
        # QEMU leaves it out of -cpu host (target/i386/cpu.c, no_autoenable_flags), and without it a guest sees no threads.
        cpu_features=("topoext",) if smt and host.topology.topoext else (),
    )


def _describe(request: GuestRequest, pages: Pages) -> str:
    """What is wanted, in a few words."""
    given = request.placement
    cores = f"the cores of CPUs {given.cpus}" if given else f"{request.cores} whole cores"
    return f"{cores}, {pages.count} huge pages of {pages.size}, " + (f"VF {given.vf}" if given and given.vf else "a VF")


def _count_pages(memory: Size, page_size: Size) -> int:
    pages, rest = divmod(memory.bytes, page_size.bytes)
    if rest:
        good = [str(Size(count * page_size.bytes)) for count in (pages, pages + 1) if count]
        raise RequestError(f"memory {memory} is no multiple of the huge page size {page_size}", f"use {' or '.join(good)}")
    return pages


def _check_count(request: GuestRequest, topology: Topology) -> None:
    """``cores`` need not be said beside a placement; if it is, it must agree. A core named in part counts as one."""
    cpus = request.placement.cpu_set if request.placement else topology.cpus
    given = sum(1 for core in topology.cores if core.cpus & cpus)
    if "cores" in request.model_fields_set and cpus <= topology.cpus and given != request.cores:
        raise RequestError(
            f"cores is {request.cores}, but placement.cpus {cpus} are {given} cores of this host",
            "leave out cores, or make them agree",
        )


def _find_vfs(wanted: PciAddress | None, host: Host) -> tuple[list[_Vf], list[str]]:
    """For each uplink the first VF that is free, or why there is none; with ``wanted``, this VF alone will do."""
    groups = {device: group for group in host.topology.iommu_groups for device in group.devices}
    vfs: list[_Vf] = []
    refused = [] if host.policy.uplinks else ["network: no uplink is configured"]
    for uplink in host.policy.uplinks:
        found = _find_vf(uplink, wanted, groups, host)
        refused.append(f"{_UPLINK}{uplink}: {found}") if isinstance(found, str) else vfs.append(found)
    return vfs, refused


def _find_vf(uplink: str, wanted: PciAddress | None, groups: Mapping[PciAddress, IommuGroup], host: Host) -> _Vf | str:
    pf = next((pf for pf in host.topology.pfs if pf.interface == uplink), None)
    if not pf:
        return "there is no SR-IOV capable network interface of this name"
    if not groups:
        return "the host has no IOMMU in use (firmware setting; boot with intel_iommu=on on Intel)"
    if not pf.up:
        return f"the PF {pf.address} is down or has no carrier"
    count = f"{len(pf.vfs)} (of {pf.total_vfs} possible)" if pf.vfs else str(host.policy.count_vfs(pf))
    strangers: list[str] = []
    for vf in _list_vfs(pf, host.policy):
        if wanted not in (None, vf.address):
            continue
        free = vf.address not in host.taken.vfs
        # A VF that has yet to be made has no group yet.
        stranger = _check_group(vf.address, groups) if free and pf.vfs else ""
        if free and not stranger:
            return vf
        if wanted:
            return stranger or f"VF {wanted} is a guest's"
        strangers += [stranger] if stranger else []
    return "; ".join([f"VF {wanted} is none of its {count}" if wanted else f"no VF is left of {count}", *strangers])


def _list_vfs(pf: PhysicalFunction, policy: Policy) -> Iterator[_Vf]:
    """The PF's VFs in order of their number.

    The kernel refuses to change sriov_numvfs between two numbers above 0 (drivers/pci/iov.c: EBUSY), and going through 0 would
    take other guests' VFs away. So if VFs exist, these are all there are.
    """
    for vf in sorted(pf.vfs, key=lambda vf: vf.index):
        yield _Vf(pf, vf.index, vf.address)
    for index in range(0 if pf.vfs else policy.count_vfs(pf)):
        yield _Vf(pf, index, pf.vf_address(index))


def _check_group(address: PciAddress, groups: Mapping[PciAddress, IommuGroup]) -> str:
    """Why the VF's IOMMU group keeps it from being a guest's, or nothing."""
    if address not in groups:
        return f"VF {address} is in no IOMMU group"
    others = ", ".join(str(device) for device in groups[address].devices if device != address)
    return f"VF {address} shares IOMMU group {groups[address].number} with {others}" if others else ""


def _choose_mac(seed: str, used: frozenset[MacAddress]) -> MacAddress:
    """An unused address; the seed makes hosts on one network differ, and a guest keep its address when it comes back."""
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:3], "big")
    for step in range(_MAC_SUFFIXES):
        suffix = f"{(start + step) % _MAC_SUFFIXES:06x}"
        mac = MacAddress(f"{_MAC_PREFIX}:{suffix[:2]}:{suffix[2:4]}:{suffix[4:]}")
        if mac not in used:
            return mac
    raise NoRoom("no Ethernet address is left", (f"all of {_MAC_PREFIX}:* are taken",))
