"""Chooses the edge mode of an uplink. Pure.

A guest gets a VF wherever the uplink can have VFs: in VEPA mode or, if the NIC has none and the uplink has VLANs for it, in the
mode channel. Otherwise a software edge is possible, which is weaker: the planner never
chooses it unless the request or the host's policy accepts that by name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.host.edge import SOFTWARE, may_have_vepa
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import Plan, Policy
from orchestrator.model.topology import Topology
from orchestrator.model.waiver import Waiver

NO_IOMMU = "the host has no IOMMU in use (firmware setting; boot with intel_iommu=on on Intel)"


@dataclass(frozen=True)
class EdgeChoice:
    """``why``: the reason for a mode other than VEPA; empty for VEPA."""

    mode: EdgeMode
    why: str = ""


def choose_edge(uplink: str, topology: Topology, policy: Policy, accepted: Collection[Waiver]) -> EdgeChoice | str:
    """Returns a sentence if a guest cannot have a NIC of the uplink, or if a weaker one was not accepted.

    ``accepted`` are the waivers of the request; those of the policy are added.
    """
    choice = find_edge(uplink, topology, policy)
    if isinstance(choice, str) or not choice.mode.is_software:
        return choice
    interface = topology.find_interface(uplink)
    if interface and not interface.up:
        return f"{uplink} is down or has no carrier"
    needed = [Waiver.SOFTWARE_EDGE, *([] if topology.iommu_groups else [Waiver.NO_IOMMU])]
    lacking = [waiver for waiver in needed if waiver not in (*accepted, *policy.accept)]
    if lacking:
        options = " ".join(f"--accept {waiver}" for waiver in lacking)
        reasons = "; ".join(f"{waiver}: {waiver.reason}" for waiver in lacking)
        return f"{choice.why}; edge mode {choice.mode} is possible, but weaker ({reasons}): to accept it, add {options}"
    return choice


def find_edge(uplink: str, topology: Topology, policy: Policy) -> EdgeChoice | str:
    """The mode that the uplink is configured to have, or can have; a sentence if it can have none. Ignores waivers and links."""
    wanted = dict(policy.edges).get(uplink)
    no_vfs = explain_no_vfs(uplink, topology)
    if wanted is EdgeMode.CHANNEL:
        return explain_no_channel(uplink, topology, policy) or EdgeChoice(wanted, f"it is configured for {uplink}")
    if wanted and not wanted.is_software:
        return no_vfs or EdgeChoice(wanted)
    if not wanted and not no_vfs:
        no_vepa = explain_no_vepa(uplink, topology)
        possible = no_vepa and not explain_no_channel(uplink, topology, policy)
        return EdgeChoice(EdgeMode.CHANNEL, no_vepa) if possible else EdgeChoice(EdgeMode.VEPA)
    interface = topology.find_interface(uplink)
    if interface is None:
        return no_vfs or f"there is no Ethernet interface {uplink} for edge mode {wanted}"
    refused = []
    for mode in [wanted] if wanted else SOFTWARE:
        if reason := SOFTWARE[mode].check_uplink(interface):
            refused.append(f"edge mode {mode}: {reason}")
        else:
            return EdgeChoice(mode, f"it is configured for {uplink}" if wanted else no_vfs)
    return "; ".join([*([] if wanted else [no_vfs]), *refused])


def explain_no_vfs(uplink: str, topology: Topology) -> str:
    """The lasting reason why guests cannot have VFs of the uplink, or empty. A missing link is not one."""
    pf = topology.find_uplink(uplink)
    if not pf:
        return explain_no_uplink(topology)
    if not topology.group_of:
        unread = [group.fault for group in topology.iommu_groups if group.fault]
        return f"no IOMMU group can be read: {unread[0]}" if unread else NO_IOMMU
    return pf.describe_uselessness()


def explain_no_vepa(uplink: str, topology: Topology) -> str:
    """The reason why the uplink's NIC cannot have VEPA mode, as far as its chip and driver tell; empty if it may."""
    pf = topology.find_uplink(uplink)
    if pf is None or may_have_vepa(pf):
        return ""
    return f"the driver {pf.driver or 'none'} of PF {pf.address} is not known to support VEPA"


def explain_no_channel(uplink: str, topology: Topology, policy: Policy) -> str:
    """The reason why the uplink cannot have the mode channel; empty if it can."""
    missing = "" if policy.channels.get(uplink) else f"it has no VLANs for guests ([uplinks.{uplink}] channels)"
    return explain_no_vfs(uplink, topology) or missing


def explain_no_uplink(topology: Topology) -> str:
    """Names the PFs without an interface: one of them may be the uplink."""
    absent = [f"PF {pf.address}: {pf.fault}" for pf in topology.pfs if pf.interface is None and pf.fault]
    return "; ".join(["there is no SR-IOV capable network interface of this name", *absent])


def explain_edges(plan: Plan, topology: Topology, policy: Policy) -> tuple[str, ...]:
    """One sentence per NIC of a software edge: why it has no VF, and what is weaker; or of the mode channel: what it needs."""
    sentences = []
    for number, nic in enumerate(plan.nics, 1):
        if nic.edge.is_software or nic.edge is EdgeMode.CHANNEL:
            choice = find_edge(nic.interface, topology, policy)
            why = choice.why if isinstance(choice, EdgeChoice) else choice
            by = "the manager sets that at its port" if nic.interface in policy.tied else "the manager does not set that"
            needs = f"the switch must translate its VLAN {nic.vlan} to {nic.switch_vlan or 'untagged frames'}: {by}"
            more = Waiver.SOFTWARE_EDGE.reason if nic.edge.is_software else needs
            sentences.append(f"NIC {number} on {nic.interface} has edge mode {nic.edge}: {why}; {more}")
    return tuple(sentences)
