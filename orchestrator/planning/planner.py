"""Which cores, pages and virtual function a guest gets. Pure: request + topology + what is taken → plan, or NoRoom."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from orchestrator.errors import NoRoom, RequestError
from orchestrator.model.plan import Claims, Plan, Policy, VfPlan
from orchestrator.model.request import GuestRequest
from orchestrator.model.topology import IommuGroup, PhysicalFunction, Topology, VirtualFunction
from orchestrator.planning.host_check import explain_no_uplink, find_blockers
from orchestrator.planning.places import Host, Pages, Place, check_place, find_places
from orchestrator.values import MacAddress, PciAddress, Size

MAC_PREFIX = "02:4e:48"
"""How the addresses of all guests begin: locally administered (bit 1 of the first byte, IEEE 802-2014 8.4), and "NH" in ASCII, so
that a capture shows whose frames they are."""
_MAC_SUFFIXES = 1 << 24
_MOST_REASONS = 8
"""VFs of an uplink that a refusal names with a reason each."""
_UPLINK = "uplink "


def plan_guest(request: GuestRequest, topology: Topology, taken: Claims, policy: Policy) -> Plan:
    """Chooses whole physical cores, huge pages of the same node, and a VF; the same input gives the same plan.

    What others may use later is the last choice. The node of the VF's PF is preferred, then the node with the fewest cores left
    over, then the one where the cores are neighbours, then the one with the fewest pages left over, then the uplink named first,
    then the lower node. Which of a node's cores: see ``find_places``. If the kernel isolates some CPUs, only these.

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
    blockers = find_blockers(policy, topology)
    if not vfs or not places or blockers:
        hint = "`nohype survey` shows what the host has, `nohype guest list` who owns it"
        reasons = (*(f"host: {blocker.text}" for blocker in blockers), *no_vfs, *no_places)
        raise NoRoom(
            f"no room for guest {request.name!r} ({_describe(request, pages)})",
            reasons,
            next((blocker.hint for blocker in blockers), hint),
        )

    def rank(pair: tuple[_Vf, Place]) -> tuple[int, bool, tuple[int, int, int]]:
        vf, place = pair
        last = place.last + (vf.address in taken.last_vfs)
        return last, vf.pf.node not in (None, place.node), place.left

    # min() keeps the first of equals, and both lists are in order of preference.
    vf, place = min(product(vfs, places), key=rank)
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
    now: VirtualFunction | None = None
    """As it is, None if it has yet to be made."""


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
        housekeeping=host.policy.housekeeping & host.topology.cpus,
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
    pf = host.topology.find_uplink(uplink)
    if not pf:
        return explain_no_uplink(host.topology)
    if reason := _check_pf(pf, groups, host):
        return reason
    count = f"{len(pf.vfs)} (of {pf.total_vfs} possible)" if pf.vfs else str(host.policy.count_vfs(pf))
    refused: list[str] = []
    vfs: Iterable[_Vf] = _list_vfs(pf, host.policy)
    if host.taken.last_vfs:
        vfs = sorted(vfs, key=lambda vf: vf.address in host.taken.last_vfs)
    for vf in vfs:
        if wanted not in (None, vf.address):
            continue
        free = vf.address not in host.taken.vfs and (pf.address, vf.index) not in host.taken.numbers
        reason = _check_vf(pf, vf, groups, host) if free else ""
        if free and not reason:
            return vf
        if wanted:
            return reason or f"VF {wanted} is a guest's"
        refused += [reason] if reason else []
    more = [f"and {len(refused) - _MOST_REASONS} more"] if len(refused) > _MOST_REASONS else []
    return "; ".join(
        [f"VF {wanted} is none of its {count}" if wanted else f"no VF is left of {count}", *refused[:_MOST_REASONS], *more]
    )


def find_unknown(topology: Topology, policy: Policy) -> PhysicalFunction | None:
    """The first uplink whose VFs' addresses only the kernel can tell, and only once they are made."""
    for uplink in policy.uplinks:
        pf = topology.find_uplink(uplink)
        if pf and pf.up and not pf.describe_uselessness() and not pf.tells_addresses(policy.count_vfs(pf)):
            return pf
    return None


def _check_pf(pf: PhysicalFunction, groups: Mapping[PciAddress, IommuGroup], host: Host) -> str:
    """Why none of the PF's VFs can be a guest's, or nothing."""
    if not groups:
        unread = [group.fault for group in host.topology.iommu_groups if group.fault]
        none = "the host has no IOMMU in use (firmware setting; boot with intel_iommu=on on Intel)"
        return f"no IOMMU group can be read: {unread[0]}" if unread else none
    if reason := pf.describe_uselessness():
        return reason
    if not pf.up:
        return f"the PF {pf.address} is down or has no carrier"
    if not pf.tells_addresses(host.policy.count_vfs(pf)):
        return f"the PF {pf.address} does not tell its VFs' addresses before they are made, as for the first guest on it"
    return ""


def _list_vfs(pf: PhysicalFunction, policy: Policy) -> Iterator[_Vf]:
    """The PF's VFs in order of their number.

    The kernel refuses to change sriov_numvfs between two numbers above 0 (drivers/pci/iov.c: EBUSY), and going through 0 would
    take other guests' VFs away. So if VFs exist, these are all there are.
    """
    for vf in sorted(pf.vfs, key=lambda vf: vf.index):
        yield _Vf(pf, vf.index, vf.address, vf)
    for index in range(0 if pf.vfs else policy.count_vfs(pf)):
        yield _Vf(pf, index, pf.vf_address(index))


def _check_vf(pf: PhysicalFunction, vf: _Vf, groups: Mapping[PciAddress, IommuGroup], host: Host) -> str:
    """Why the host, or the VF's IOMMU group, keeps it from being a guest's, or nothing. One yet to be made has no group."""
    if vf.address == pf.address:
        return f"VF {vf.index} is said to be at {vf.address}, which is the PF itself"
    if vf.now is None:
        return ""
    if vf.now.use:
        return f"VF {vf.address} is used by the host: {vf.now.use}"
    if vf.address not in groups:
        fault = next(
            (group.fault for group in host.topology.iommu_groups if group.fault and group.number == vf.now.iommu_group), ""
        )
        return f"the IOMMU group of VF {vf.address} cannot be read: {fault}" if fault else f"VF {vf.address} is in no IOMMU group"
    others = ", ".join(str(device) for device in groups[vf.address].devices if device != vf.address)
    return f"VF {vf.address} shares IOMMU group {groups[vf.address].number} with {others}" if others else ""


def _choose_mac(seed: str, used: frozenset[MacAddress]) -> MacAddress:
    """An unused address; the seed makes hosts on one network differ, and a guest keep its address when it comes back."""
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:3], "big")
    for step in range(_MAC_SUFFIXES):
        suffix = f"{(start + step) % _MAC_SUFFIXES:06x}"
        mac = MacAddress(f"{MAC_PREFIX}:{suffix[:2]}:{suffix[2:4]}:{suffix[4:]}")
        if mac not in used:
            return mac
    raise NoRoom("no Ethernet address is left", (f"all of {MAC_PREFIX}:* are taken",))
