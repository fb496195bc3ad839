"""network-isolated: the PF holds each of the guest's VFs in its network, and lets it send only as itself. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan
from orchestrator.model.proof import WEAKER, Measurement, count_findings, not_measured
from orchestrator.model.topology import VfState
from orchestrator.values import PciAddress


@dataclass(frozen=True)
class VfReading:
    """The settings of a VF, read from its PF. ``interface`` is the PF's."""

    interface: str
    state: VfState


Readings = Mapping[PciAddress, VfReading | str]
"""By VF; why it could not be read instead."""
Promised = Mapping[str, tuple[NicPlan, ...] | None]
"""The NICs that the manager gave each guest, running or not; None for a running guest that it did not create."""


@dataclass(frozen=True)
class Strays:
    """Addresses of guests at other ports of the external switch, each with its port; or why the switch was not read.

    Attributes:
        translated: per address in a VLAN of its own, what the switch translates it to, as it should.
        untranslated: per address, what is wrong with its translation.
    """

    ports: Mapping[str, str]
    gap: str = ""
    translated: Mapping[str, str] = field(default_factory=dict)
    untranslated: Mapping[str, str] = field(default_factory=dict)


def prove_network_isolated(guest: RunningGuest, vfs: Readings, promised: Promised, strays: Strays | None = None) -> Measurement:
    """Passes only if the PF enforces the settings that the manager promised, and no other VF of the PF is in the network's VLAN.

    The records are what is compared: which network a guest belongs to is not visible on the host.
    """
    own = {address: vfs[address] for address in guest.hostdevs if address in vfs}
    nics = {nic.address: nic for nic in promised.get(guest.name) or ()}
    unread = [f"VF {address} could not be read: {reading}" for address, reading in own.items() if isinstance(reading, str)]
    unread += [
        f"VF {address} could not be read: no PF that was surveyed has it"
        for address in guest.hostdevs
        if address in nics and address not in vfs
    ]
    findings: list[str] = []
    evidence: list[str] = []
    for address, reading in own.items():
        if isinstance(reading, str):
            continue
        nic = nics.get(address)
        findings += _check_settings(address, reading.state, nic)
        findings += _find_intruders(address, reading, nic, vfs, promised)
        evidence += [f"VF {address}: {_describe(reading, nic)}", *_list_limits(address, reading.state)]
        evidence += _list_untagged(reading, vfs, promised)
    duplicates = _find_duplicates(promised.get(guest.name) or (), strays)
    findings += duplicates
    channels = [nic for nic in promised.get(guest.name) or () if nic.edge is EdgeMode.CHANNEL]
    findings += [strays.untranslated[str(nic.mac)] for nic in channels if strays and str(nic.mac) in strays.untranslated]
    evidence += _describe_translations(channels, strays)
    if not findings and unread:
        return not_measured("; ".join(unread))
    if not findings and guest.hostdevs and promised.get(guest.name) is None:
        return not_measured("the manager did not create this guest: which networks it belongs to is not known")
    soft = [f"{nic.interface or nic.mac}: the host's kernel forwards its frames, no PF does" for nic in guest.nics]
    if not findings and not own and soft:
        return not_measured("; ".join(soft))
    evidence += [f"{WEAKER}{text}" for text in soft]
    if strays:
        seen = strays.gap or f"{len(duplicates)} of its addresses at other ports"
        evidence.append(f"table of the external switch: {seen}")
    return count_findings([*findings, *unread], evidence or ["the guest has no VF"])


def _check_settings(address: PciAddress, state: VfState, nic: NicPlan | None) -> list[str]:
    findings = [] if state.spoof_check is not False else [f"VF {address}: the spoof check is off: it can send from any address"]
    findings += [f"VF {address}: trusted: it can change its address, and receive all frames"] if state.trust else []
    if state.link_state == "disable":
        findings.append(f"VF {address}: its link is disabled")
    if nic is None:
        return findings
    expected = {"address": (state.mac, nic.mac), "port VLAN": (state.vlan, nic.vlan), "rate": (state.max_rate, nic.rate)}
    of = f" (network {nic.network})" if nic.network else ""
    return findings + [
        f"VF {address}: {name} is {now or 'none'}, expected {wanted or 'none'}{of}"
        for name, (now, wanted) in expected.items()
        if now != wanted
    ]


def _find_intruders(address: PciAddress, reading: VfReading, nic: NicPlan | None, vfs: Readings, promised: Promised) -> list[str]:
    """VFs with the same address, and VFs of the same PF with the same port VLAN that are not in the network."""
    network = nic.network if nic else ""
    members = {one.address for nics in promised.values() for one in nics or () if network and one.network == network}
    findings = []
    for other, found in vfs.items():
        if other == address or isinstance(found, str):
            continue
        together = found.interface == reading.interface and found.state.vlan == reading.state.vlan != 0
        if together and other not in members:
            findings.append(f"VF {other} of {found.interface} has port VLAN {found.state.vlan} too, and is not in this network")
        if reading.state.mac and found.state.mac == reading.state.mac:
            findings.append(f"VF {other} of {found.interface} has the same address {found.state.mac}")
    return findings


def _find_duplicates(nics: tuple[NicPlan, ...], strays: Strays | None) -> list[str]:
    found = strays.ports if strays else {}
    return [
        f"address {nic.mac}: the external switch has seen it at port {found[str(nic.mac)]} too, from another station"
        for nic in nics
        if str(nic.mac) in found
    ]


def _describe_translations(nics: Iterable[NicPlan], strays: Strays | None) -> list[str]:
    """Which guests share a network is decided by the switch then, not by the NIC."""
    lines = []
    for nic in nics:
        if text := strays.translated.get(str(nic.mac)) if strays else None:
            lines.append(f"the switch translates {text}")
        elif strays is None or str(nic.mac) not in strays.untranslated:
            lines.append(f"{WEAKER}how the switch translates VLAN {nic.vlan} is not measured")
    return lines


def _list_limits(address: PciAddress, state: VfState) -> list[str]:
    absent = [name for name, value in (("the spoof check", state.spoof_check), ("trust", state.trust)) if value is None]
    return [f"{WEAKER}the driver of the PF does not report {' and '.join(absent)} of VF {address}"] if absent else []


def _list_untagged(reading: VfReading, vfs: Readings, promised: Promised) -> list[str]:
    """Without a port VLAN a VF sends tagged frames as they are, and its driver may ask for each VLAN (igb_set_vf_vlan_msg())."""
    if not reading.state.vlan:
        return []
    names = {nic.address: name for name, nics in promised.items() for nic in nics or ()}
    found = [
        f"{names[address]} (VF {one.state.index})"
        for address, one in vfs.items()
        if not isinstance(one, str) and one.interface == reading.interface and address in names and not one.state.vlan
    ]
    text = f"{WEAKER}a guest that is in no network can use each VLAN of {reading.interface} and of its switch port"
    return [f"{text}: {', '.join(sorted(found))}"] if found else []


def _describe(reading: VfReading, nic: NicPlan | None) -> str:
    state = reading.state
    network = f"network {nic.network}" if nic and nic.network else "no network"
    rate = f"at most {state.max_rate} Mbit/s" if state.max_rate else "no limit of the rate"
    vlan = f"port VLAN {state.vlan}" if state.vlan else "untagged"
    return f"{network}, {vlan}, address {state.mac}, {rate}, VF {state.index} of {reading.interface} (netlink)"
