"""Chooses the VFs and Ethernet addresses of a guest's NICs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from orchestrator.model.edge import EdgeMode
from orchestrator.model.network import describe_vlans
from orchestrator.model.plan import NicPlan, Policy
from orchestrator.model.request import GuestRequest, NicRequest
from orchestrator.model.topology import Interface, IommuGroup, PhysicalFunction, Topology, VirtualFunction
from orchestrator.model.waiver import Waiver
from orchestrator.planning.inputs import PlanningInput
from orchestrator.planning.mac import choose_mac
from orchestrator.planning.network import explain_not_carried
from orchestrator.planning.uplink import choose_edge, explain_no_uplink
from orchestrator.values import MacAddress, PciAddress

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
    edge: EdgeMode = EdgeMode.VEPA
    vlan: int = 0  # of its own, with the edge mode channel

    @property
    def node(self) -> int | None:
        return self.pf.node

    def plan(self, mac: MacAddress) -> NicPlan:
        return NicPlan(self.pf.address, self.pf.interface or "", self.index, self.address, mac, self.edge, vlan=self.vlan)

    @property
    def seed(self) -> str:
        """Differs between hosts."""
        return str(self.pf.mac)


@dataclass(frozen=True)
class FreePort:
    """A NIC of a software edge that a guest could get: any number per uplink."""

    uplink: Interface
    edge: EdgeMode
    address: None = None

    @property
    def node(self) -> int | None:
        return self.uplink.node

    @property
    def seed(self) -> str:
        """As of FreeVf."""
        return str(self.uplink.mac)

    def plan(self, mac: MacAddress) -> NicPlan:
        # The guest's address is unique on the host, and so is the name, which has the maximum of 15 characters.
        return NicPlan(None, self.uplink.name, None, None, mac, self.edge, tap=f"nh-{str(mac).replace(':', '')}")


FreeNic = FreeVf | FreePort


def find_nics(request: GuestRequest, host: PlanningInput) -> tuple[list[tuple[FreeNic, ...]], list[str]]:
    """Per usable uplink the NICs if those without a named uplink use it; and the reasons why other uplinks are not usable."""
    groups = host.topology.group_of
    choices: list[tuple[FreeNic, ...]] = []
    refused = [] if host.policy.uplinks else ["network: no uplink is configured"]
    for uplink in host.policy.uplinks:
        choice = _choose(request, uplink, groups, host)
        refused.append(choice) if isinstance(choice, str) else choices.append(choice)
    return choices, list(dict.fromkeys(refused))


def plan_nics(request: GuestRequest, chosen: Sequence[FreeNic], host: PlanningInput) -> tuple[NicPlan, ...]:
    """Adds Ethernet addresses. Raises NoRoom if all addresses are allocated."""
    used = host.allocated.macs | {pf.mac for pf in host.topology.pfs if pf.mac}
    nics: list[NicPlan] = []
    for number, (nic, wanted) in enumerate(zip(chosen, request.wanted_nics, strict=True)):
        # Both of the host's id and the uplink's address: copied hosts can have the same id, emulated NICs the same address.
        mac = choose_mac(f"{host.site.host_id} {nic.seed} {request.name} {number}", used)
        used |= {mac}
        network = host.site.networks[wanted.network] if wanted.network else None
        plan = nic.plan(mac)
        if network:
            plan = replace(plan, network=network.name)
            in_channel = plan.edge is EdgeMode.CHANNEL
            plan = replace(plan, switch_vlan=network.vlan) if in_channel else replace(plan, vlan=network.vlan)
        nics.append(replace(plan, rate=wanted.rate or 0))
    return tuple(nics)


def list_addresses(nics: Sequence[NicRequest]) -> tuple[str, ...]:
    """Words for the guest's kernel command line: the IP addresses of its NICs, numbered from 1 by PCI slot."""
    return tuple(
        f"nohype.address{number if number > 1 else ''}={nic.address}" for number, nic in enumerate(nics, 1) if nic.address
    )


def _choose(
    request: GuestRequest, uplink: str, groups: Mapping[PciAddress, IommuGroup], host: PlanningInput
) -> tuple[FreeNic, ...] | str:
    nics = request.wanted_nics
    named = {nic.vf_address for nic in nics if nic.vf_address}
    chosen: list[FreeNic] = []
    for number, nic in enumerate(nics, 1):
        name = nic.uplink or _find_uplink_of(nic.vf_address, host) or uplink
        found: FreeNic | EdgeMode | str = _check_network(nic, name, host) or _find_port(name, nic, request.accept, host)
        is_open = isinstance(found, EdgeMode) and found is not EdgeMode.CHANNEL and not nic.network
        if is_open and any(not explain_not_carried(host.policy, name, one) for one in host.site.closed):
            # Such a VF sends tagged frames as they are, and its driver may ask for each VLAN (igb_set_vf_vlan_msg()).
            found = "a NIC without a network could enter the networks of others; request a network"
        if isinstance(found, EdgeMode):
            excluded = (named - {nic.vf_address}) | {one.address for one in chosen if one.address}
            edge, found = found, _find_vf(name, nic.vf_address, excluded, groups, host)
            if isinstance(found, FreeVf) and edge is EdgeMode.CHANNEL:
                found = _give_channel(found, name, chosen, host)
        if isinstance(found, str):
            return f"{UPLINK}{name}: {found}" + (f" (NIC {number} of {len(nics)})" if len(nics) > 1 else "")
        chosen.append(found)
    return tuple(chosen)


def _give_channel(vf: FreeVf, uplink: str, chosen: Iterable[FreeNic], host: PlanningInput) -> FreeVf | str:
    """Adds the lowest VLAN that no other VF of the PF and no network has; a sentence if there is none."""
    used = {vlan for pf, vlan in host.allocated.channels if pf == vf.pf.address}
    used |= {one.vlan for one in chosen if isinstance(one, FreeVf) and one.pf.address == vf.pf.address}
    vlans = host.policy.channels.get(uplink, frozenset())
    if free := vlans - used - host.site.taken:
        return replace(vf, edge=EdgeMode.CHANNEL, vlan=min(free))
    by = "guests and networks" if vlans & host.site.taken else "guests"
    return f"all of VLANs {describe_vlans(vlans)} are used by {by} ([uplinks.{uplink}] channels)"


def _find_port(uplink: str, nic: NicRequest, accepted: Sequence[Waiver], host: PlanningInput) -> FreePort | EdgeMode | str:
    """The edge mode if the uplink has VFs; a sentence if guests can have nothing of it."""
    if uplink not in host.policy.uplinks:
        return "not configured ([host] uplinks)"
    choice = choose_edge(uplink, host.topology, host.policy, accepted)
    if isinstance(choice, str):
        return choice
    interface = host.topology.find_interface(uplink)
    if nic.network and choice.mode is EdgeMode.CHANNEL and uplink not in host.policy.tied:
        why = f"the manager sets the switch then, which it does not know ([uplinks.{uplink}] switch and port)"
        return f"with edge mode {choice.mode} a NIC cannot join a network: {why}"
    if not choice.mode.is_software or interface is None:
        return choice.mode
    if nic.network or nic.rate:
        return f"with edge mode {choice.mode} a NIC can have neither a network nor a rate: that requires a VF"
    return f"edge mode {choice.mode} has no VFs, but VF {nic.vf} is requested" if nic.vf else FreePort(interface, choice.mode)


def _check_network(nic: NicRequest, uplink: str, host: PlanningInput) -> str:
    """The reason why the NIC cannot join its network through this uplink; empty if it can."""
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
    pf = host.topology.find_uplink(uplink)
    if not pf:
        return explain_no_uplink(host.topology)
    if reason := _check_pf(pf, host):
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


def _check_pf(pf: PhysicalFunction, host: PlanningInput) -> str:
    """The reason why guests cannot have a VF of the PF now; empty if they can. ``choose_edge`` finds the lasting reasons."""
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
