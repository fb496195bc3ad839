"""Chooses the VFs and Ethernet addresses of a guest's NICs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from orchestrator.model.plan import NicPlan, Policy
from orchestrator.model.request import GuestRequest, NicRequest
from orchestrator.model.topology import IommuGroup, PhysicalFunction, Topology, VirtualFunction
from orchestrator.planning.host_check import explain_no_uplink
from orchestrator.planning.inputs import PlanningInput
from orchestrator.planning.mac import choose_mac
from orchestrator.planning.network import explain_not_carried
from orchestrator.values import PciAddress

_MOST_REASONS = 8
"""Maximum number of an uplink's VFs that a refusal lists with a reason."""
UPLINK = "uplink "
"""Prefix of reasons that name VFs."""


@dataclass(frozen=True)
class FreeVf:
    """A VF that a guest could get. ``now`` is None if the VF is not created yet."""

    pf: PhysicalFunction
    index: int
    address: PciAddress
    now: VirtualFunction | None = None


def find_vfs(nics: Sequence[NicRequest], host: PlanningInput) -> tuple[list[tuple[FreeVf, ...]], list[str]]:
    """Per usable uplink the VFs if NICs without a named uplink use it; and the reasons why other uplinks are not usable."""
    groups = host.topology.group_of
    choices: list[tuple[FreeVf, ...]] = []
    refused = [] if host.policy.uplinks else ["network: no uplink is configured"]
    for uplink in host.policy.uplinks:
        choice = _choose(nics, uplink, groups, host)
        refused.append(choice) if isinstance(choice, str) else choices.append(choice)
    return choices, list(dict.fromkeys(refused))


def plan_nics(request: GuestRequest, vfs: Sequence[FreeVf], host: PlanningInput) -> tuple[NicPlan, ...]:
    """Adds Ethernet addresses. Raises NoRoom if all addresses are allocated."""
    used = host.allocated.macs | {pf.mac for pf in host.topology.pfs if pf.mac}
    nics: list[NicPlan] = []
    for number, (vf, wanted) in enumerate(zip(vfs, request.wanted_nics, strict=True)):
        # Both of the host's id and the PF's address: copied hosts can have the same id, emulated NICs the same address.
        mac = choose_mac(f"{host.site.host_id} {vf.pf.mac} {request.name} {number}", used)
        used |= {mac}
        network = host.site.networks[wanted.network] if wanted.network else None
        nics.append(
            NicPlan(
                vf.pf.address,
                vf.pf.interface or "",
                vf.index,
                vf.address,
                mac,
                network=network.name if network else "",
                vlan=network.vlan if network else 0,
                rate=wanted.rate or 0,
            )  # fmt: skip
        )
    return tuple(nics)


def list_addresses(nics: Sequence[NicRequest]) -> tuple[str, ...]:
    """Words for the guest's kernel command line: the IP addresses of its NICs, numbered from 1 by PCI slot."""
    return tuple(
        f"nohype.address{number if number > 1 else ''}={nic.address}" for number, nic in enumerate(nics, 1) if nic.address
    )


def _choose(
    nics: Sequence[NicRequest], uplink: str, groups: Mapping[PciAddress, IommuGroup], host: PlanningInput
) -> tuple[FreeVf, ...] | str:
    named = {nic.vf_address for nic in nics if nic.vf_address}
    chosen: list[FreeVf] = []
    for number, nic in enumerate(nics, 1):
        name = nic.uplink or _find_uplink_of(nic.vf_address, host) or uplink
        excluded = (named - {nic.vf_address}) | {vf.address for vf in chosen}
        found = _check_network(nic, name, host) or _find_vf(name, nic.vf_address, excluded, groups, host)
        if isinstance(found, str):
            return f"{UPLINK}{name}: {found}" + (f" (NIC {number} of {len(nics)})" if len(nics) > 1 else "")
        chosen.append(found)
    return tuple(chosen)


def _check_network(nic: NicRequest, uplink: str, host: PlanningInput) -> str:
    """The reason why the NIC cannot join its network, or have its rate, through this uplink; empty if it can."""
    mode = dict(host.policy.edges).get(uplink)
    if mode and mode.is_software and (nic.network or nic.rate):
        return f"with edge mode {mode} a NIC can have neither a network nor a rate: that requires a VF"
    return explain_not_carried(host.policy, uplink, host.site.networks[nic.network]) if nic.network else ""


def _find_uplink_of(address: PciAddress | None, host: PlanningInput) -> str | None:
    """The uplink of a VF, also of a VF that is not created yet."""
    for uplink in host.policy.uplinks if address else ():
        pf = host.topology.find_uplink(uplink)
        if pf and pf.tells_addresses(host.policy.count_vfs(pf)):
            if any(vf.address == address for vf in _list_vfs(pf, host.policy)):
                return uplink
    return None


def _find_vf(
    uplink: str,
    wanted: PciAddress | None,
    excluded: Iterable[PciAddress],
    groups: Mapping[PciAddress, IommuGroup],
    host: PlanningInput,
) -> FreeVf | str:
    if uplink not in host.policy.uplinks:
        return "not configured ([host] uplinks)"
    pf = host.topology.find_uplink(uplink)
    if not pf:
        return explain_no_uplink(host.topology)
    if reason := _check_pf(pf, groups, host):
        return reason
    count = f"{len(pf.vfs)} (of {pf.total_vfs} possible)" if pf.vfs else str(host.policy.count_vfs(pf))
    refused: list[str] = []
    taken = host.allocated.vfs.union(excluded)
    vfs: Iterable[FreeVf] = _list_vfs(pf, host.policy)
    if host.allocated.last_vfs:
        vfs = sorted(vfs, key=lambda vf: vf.address in host.allocated.last_vfs)
    for vf in vfs:
        if wanted not in (None, vf.address):
            continue
        free = vf.address not in taken and (pf.address, vf.index) not in host.allocated.numbers
        reason = _check_vf(pf, vf, groups, host) if free else ""
        if free and not reason:
            return vf
        if wanted:
            return reason or f"VF {wanted} is owned by a guest"
        refused += [reason] if reason else []
    more = [f"and {len(refused) - _MOST_REASONS} more"] if len(refused) > _MOST_REASONS else []
    return "; ".join(
        [f"VF {wanted} is not one of its {count} VFs" if wanted else f"no free VF of {count}", *refused[:_MOST_REASONS], *more]
    )


def find_unknown(topology: Topology, policy: Policy) -> tuple[PhysicalFunction, ...]:
    """Uplinks whose VFs' addresses are unknown until the VFs are created."""
    pfs = [topology.find_uplink(uplink) for uplink in policy.uplinks]
    return tuple(
        pf for pf in pfs if pf and pf.up and not pf.describe_uselessness() and not pf.tells_addresses(policy.count_vfs(pf))
    )


def _check_pf(pf: PhysicalFunction, groups: Mapping[PciAddress, IommuGroup], host: PlanningInput) -> str:
    """The reason why guests cannot have a VF of the PF; empty if they can."""
    if not groups:
        unread = [group.fault for group in host.topology.iommu_groups if group.fault]
        none = "the host has no IOMMU in use (firmware setting; boot with intel_iommu=on on Intel)"
        return f"no IOMMU group can be read: {unread[0]}" if unread else none
    if reason := pf.describe_uselessness():
        return reason
    if not pf.up:
        return f"the PF {pf.address} is down or has no carrier"
    if not pf.tells_addresses(host.policy.count_vfs(pf)):
        return f"the PF {pf.address} does not report the addresses of its VFs before they are created"
    return ""


def _list_vfs(pf: PhysicalFunction, policy: Policy) -> Iterator[FreeVf]:
    """The existing VFs or, if there are none, the VFs that would be created.

    The kernel refuses to change sriov_numvfs between two numbers above 0 (drivers/pci/iov.c: EBUSY), and 0 would remove the
    VFs of other guests.
    """
    for vf in sorted(pf.vfs, key=attrgetter("index")):
        yield FreeVf(pf, vf.index, vf.address, vf)
    for index in range(0 if pf.vfs else policy.count_vfs(pf)):
        yield FreeVf(pf, index, pf.vf_address(index))


def _check_vf(pf: PhysicalFunction, vf: FreeVf, groups: Mapping[PciAddress, IommuGroup], host: PlanningInput) -> str:
    """The reason why guests cannot have the VF, or empty. A VF that is not created yet has no IOMMU group."""
    if vf.address == pf.address:
        return f"VF {vf.index} has the address {vf.address} of the PF itself"
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
