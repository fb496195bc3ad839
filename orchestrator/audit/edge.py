"""The part of the proof vepa for software edges: the host's kernel sends every frame out of the uplink, once.

The host sees each frame, so the proof is weaker than with VFs: it counts the frames that pass the uplink, in each direction.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from orchestrator.errors import HostError, RequestError
from orchestrator.host.edge import Tap, find_software_edge
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.edge import EdgeMode
from orchestrator.model.proof import WEAKER
from orchestrator.model.topology import Link, PhysicalFunction
from orchestrator.model.uplink import EdgeReading, Traffic
from orchestrator.model.waiver import Waiver
from orchestrator.values import MacAddress, PciAddress

TAP_PREFIX = "nh-"
"""Of the names of the manager's taps."""
EDGE_WEAKER = f"{WEAKER}{Waiver.SOFTWARE_EDGE.reason}"


def read_taps(host: HostRoot, guests: Iterable[RunningGuest]) -> tuple[EdgeReading, ...]:
    """The software edge of each emulated NIC that the manager has made, by its name and the kernel's kind."""
    named = {nic.interface: nic.mac for guest in guests for nic in guest.nics if nic.interface.startswith(TAP_PREFIX)}
    if not named:
        return ()
    try:
        links = {link.name: link for link in host.net.read_links()}
        others = _find_others(links, named)
        return tuple(_read_tap(host, name, mac, links.get(name), others) for name, mac in sorted(named.items()))
    except HostError as error:
        return tuple(EdgeReading(name, None, error.message) for name in sorted(named))


def list_addresses(guests: Iterable[RunningGuest], edges: Iterable[EdgeReading]) -> dict[str, tuple[MacAddress, ...]]:
    """The addresses of the guests on each uplink of a software edge."""
    macs = {nic.interface: nic.mac for guest in guests for nic in guest.nics}
    found: dict[str, list[MacAddress]] = {}
    for edge in edges:
        if edge.uplink:
            own = found.setdefault(edge.uplink, [])
            with suppress(RequestError):  # the manager gives no guest such an address
                own.append(MacAddress.parse(macs[edge.interface]))
    return {uplink: tuple(sorted(addresses)) for uplink, addresses in sorted(found.items())}


def _find_others(links: Mapping[str, Link], named: Container[str]) -> dict[str, list[str]]:
    """By uplink, the interfaces above it that are not of guests: each receives the uplink's broadcasts, and can send."""
    others: dict[str, list[str]] = {}
    for link in links.values():
        if link.parent and link.name not in named:
            others.setdefault(link.parent, []).append(f"{link.name} ({' '.join(filter(None, (link.kind, link.mode)))})")
    return others


def _read_tap(host: HostRoot, name: str, mac: str, link: Link | None, others: Mapping[str, list[str]]) -> EdgeReading:
    found = find_software_edge(link) if link else None
    if link is None or found is None:
        return EdgeReading(name, None, f"{name} does not exist" if link is None else f"{name} is of kind {link.kind}")
    mode, edge = found
    uplink = edge.find_uplink(host, link)
    try:
        findings = edge.diff(host, Tap(name, MacAddress.parse(mac), uplink))
    except RequestError as error:
        findings = (error.message,)
    how = f"{link.kind} in mode {link.mode or 'none'}" if link.parent else f"{link.kind} with rules of nftables"
    text = f"{name} on {uplink or 'no uplink'}: {how}, address {mac}"
    if above := others.get(uplink):
        text += f"; {uplink} also carries interfaces that are not of guests: {', '.join(sorted(above))}"
    return EdgeReading(name, mode.value, text, findings, uplink)


def find_channels(host: HostRoot, pf: PhysicalFunction, used: Collection[PciAddress], reading: EdgeReading) -> EdgeReading:
    """The mode channel if no VF of the PF has the port VLAN of a guest's VF: the NIC switches only within a VLAN. Otherwise
    ``reading``, the mode that the PF itself reports.

    ``used`` are the VFs that guests have. Raises HostError if the settings of the VFs cannot be read.
    """
    vlans = {state.index: state.vlan for state in host.net.read_vfs(pf.interface)} if pf.interface else {}
    own = {vf.index: vlans.get(vf.index, 0) for vf in pf.vfs if vf.address in used}
    if not own or not all(vlan and list(vlans.values()).count(vlan) == 1 for vlan in own.values()):
        return reading
    listed = ", ".join(f"VF {index} has port VLAN {vlan}" for index, vlan in sorted(own.items()))
    text = f"{reading.text}; {listed}, each for itself"
    if reading.mode == EdgeMode.VEB:
        text += "; the NIC switches locally: it may take frames to a VF in another VLAN as local, and drop them"
    return replace(reading, mode=EdgeMode.CHANNEL.value, text=text)


def check_edges(edges: Iterable[EdgeReading]) -> list[str]:
    """Differences of software edges from what keeps every frame out of the host's switching."""
    return [finding for edge in edges for finding in edge.findings]


def check_uplinks(traffic: Traffic) -> list[str]:
    """A frame that the host's kernel switches itself does not leave through an uplink (a capture may show it coming in)."""
    sent, received = traffic.sent, traffic.received
    ends = (traffic.source_edge, traffic.target_edge)
    out = sum(count for count, software in zip((sent, received), ends, strict=True) if software)
    back = sum(count for count, software in zip((received, sent), ends, strict=True) if software)
    findings = []
    if traffic.uplink_out != out:
        findings.append(f"{traffic.uplink_out} frames left through the uplinks of software edges, expected {out}")
    if traffic.uplink_in != back:
        findings.append(f"{traffic.uplink_in} frames came in through the uplinks of software edges, expected {back}")
    return findings


def describe_uplinks(traffic: Traffic) -> str:
    return f"uplinks of software edges: {traffic.uplink_out} of these frames out, {traffic.uplink_in} in"
