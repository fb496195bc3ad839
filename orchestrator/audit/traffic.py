"""Sends the test frames of the proof vepa between two guests, and has them counted on the host and at the external switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from typing import Protocol
from uuid import UUID

from orchestrator.audit.edge import read_taps
from orchestrator.audit.network import Strays
from orchestrator.audit.switch import start_count
from orchestrator.audit.uplink import SIZE, find_guest_address, measure_traffic
from orchestrator.errors import GuestError, SwitchError
from orchestrator.host.interfaces import find_lower
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan
from orchestrator.model.switch import PortChannel, SwitchState, SwitchTie
from orchestrator.model.uplink import EdgeReading, SwitchCount, Traffic
from orchestrator.switches.base import describe_channel
from orchestrator.switches.drivers import opened
from orchestrator.switches.verify import find_strays, find_untranslated

SendCommand = Callable[[str, str, float, UUID], str]
"""(guest name, line, timeout in seconds, guest id) → the reply to the line on the guest's console."""


class Sender(Protocol):
    """The part of `facts.Source` that the test frames need."""

    @property
    def host(self) -> HostRoot: ...
    @property
    def send_command(self) -> SendCommand: ...
    @property
    def nics(self) -> Callable[[], Mapping[UUID, tuple[NicPlan, ...]]]: ...
    @property
    def find_tie(self) -> Callable[[str], SwitchTie | None]: ...


_End = tuple[RunningGuest, IPv4Address]


def send_frames(source: Sender, guests: tuple[RunningGuest, ...], frames: int) -> tuple[Traffic, SwitchCount | str]:
    """Also returns what the external switch counted, or why it did not."""
    # A guest with several NICs sends with the first, which has the address.
    firsts = {uuid: nics[0] for uuid, nics in source.nics().items() if nics}
    (first, first_address), (second, second_address) = _choose_pair(source.host, guests, firsts)
    ids = {guest.name: guest.uuid for guest in (first, second)}

    def ask(name: str, line: str, timeout: float) -> str:
        return source.send_command(name, line, timeout, ids[name])

    edges = [_find_edge(source, guest, firsts.get(guest.uuid)) for guest in (first, second)]
    found = [edge for edge in edges if edge]
    nics = [firsts[guest.uuid] for guest in (first, second) if guest.uuid in firsts]
    tie = _find_pairs_tie(source, nics)
    measure = partial(
        measure_traffic, ask, (first.name, first_address), (second.name, second_address), frames, found,
        outside=_list_outside(source.host, found, tie),
    )  # fmt: skip
    counted: SwitchCount | str
    if isinstance(tie, str):
        traffic, counted = measure(), tie
    else:
        with opened(tie.switch, tie.key) as driver:
            port = start_count(driver, tie.port, (str(nics[0].mac), str(nics[1].mac)), SIZE)
            traffic = measure(during=port.running())
            counted = port.finish(traffic)
    return replace(traffic, source_edge=edges[0] is not None, target_edge=edges[1] is not None), counted


def _choose_pair(host: HostRoot, guests: tuple[RunningGuest, ...], firsts: Mapping[UUID, NicPlan]) -> tuple[_End, _End]:
    """Two guests of the same network; of the same uplink if there are such, since one switch port then counts their frames."""
    ends: dict[str, list[_End]] = {}
    together: dict[tuple[str, str], list[_End]] = {}
    for guest in guests:
        if (guest.hostdevs or guest.nics) and (address := find_guest_address(host, guest)) is not None:
            nic = firsts.get(guest.uuid)
            ends.setdefault(nic.network if nic else "", []).append((guest, address))
            if nic:
                together.setdefault((nic.network, nic.interface), []).append((guest, address))
    for members in (*together.values(), *ends.values()):
        if len(members) > 1:
            return members[0], members[1]
    count, where = sum(map(len, ends.values())), " of the same network" if len(ends) > 1 else ""
    raise GuestError(f"two guests{where} with an address and a NIC are required, {count} such guests are running")


def find_tie(source: Sender, uplink: str) -> SwitchTie | str:
    """The switch port of an uplink, or why it is not known."""
    try:
        found = source.find_tie(uplink)
    except SwitchError as error:
        return error.message
    return found or f"no switch is configured for uplink {uplink}: set switch and port in [uplinks.NAME]"


def read_strays(source: Sender, guests: Iterable[RunningGuest]) -> Strays:
    """Reads the table of each switch that an uplink of these guests is tied to."""
    nics = source.nics()
    ends: dict[str, list[NicPlan]] = {}
    for guest in guests:
        for nic in nics.get(guest.uuid, ()):
            ends.setdefault(nic.interface, []).append(nic)
    found = Strays({})
    for uplink, members in sorted(ends.items()):
        tie = find_tie(source, uplink)
        try:
            if isinstance(tie, str):
                found = replace(found, gap="; ".join(filter(None, (found.gap, f"not measured: {tie}"))))
                continue
            with opened(tie.switch, tie.key) as driver:
                found = _add_state(found, driver.read(), tie.port, members)
        except SwitchError as error:
            found = replace(found, gap="; ".join(filter(None, (found.gap, f"not measured: {error.message}"))))
    return found


def _add_state(found: Strays, state: SwitchState, name: str, nics: Sequence[NicPlan]) -> Strays:
    """``nics``: behind the port ``name``."""
    ports = find_strays(state, {str(nic.mac): name for nic in nics})
    port = next((one for one in state.ports if one.name == name), None)
    good, bad = dict(found.translated), dict(found.untranslated)
    for nic in nics:
        if nic.edge is EdgeMode.CHANNEL and port:
            channel = PortChannel(nic.vlan, str(nic.mac), nic.switch_vlan)
            if wrong := find_untranslated(port, [channel]):
                bad[channel.mac] = f"port {name} of the switch: {wrong[0]}"
            else:
                good[channel.mac] = f"{describe_channel(channel)} (read from port {name})"
    return replace(found, ports={**found.ports, **ports}, translated=good, untranslated=bad)


def _find_pairs_tie(source: Sender, nics: Sequence[NicPlan]) -> SwitchTie | str:
    """The switch port of the guests' uplink, or why it is not known."""
    uplinks = sorted({nic.interface for nic in nics})
    if len(nics) < 2:
        return "the manager did not create both guests: their uplink is not known"
    if len(uplinks) > 1:
        return f"the guests have different uplinks ({', '.join(uplinks)})"
    return find_tie(source, uplinks[0])


def _list_outside(host: HostRoot, edges: Sequence[EdgeReading], tie: SwitchTie | str) -> frozenset[str]:
    """Interfaces of this host where frames of software edges pass outside its switching."""
    links = host.net.read_links() if edges else ()
    lower = frozenset[str]().union(*(find_lower(links, edge.uplink) for edge in edges))
    return lower if isinstance(tie, str) or not tie.is_local else lower | {tie.port}


def _find_edge(source: Sender, guest: RunningGuest, nic: NicPlan | None) -> EdgeReading | None:
    """The software edge of this NIC; None if it has none."""
    taps = read_taps(source.host, [guest]) if nic and nic.tap else ()
    return next((edge for edge in taps if nic and edge.interface == nic.tap), None)
