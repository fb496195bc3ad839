"""Types of the responses about external switches, as in `shapes`."""

from __future__ import annotations

from typing import Literal, TypedDict


class SshAddress(TypedDict):
    """Where the manager logs in on a switch, and the host key that it accepts."""

    host: str
    port: int
    user: str
    host_key: str


class SwitchUplink(TypedDict):
    """An uplink of the host, and the port that its cable leads to."""

    uplink: str
    port: str


class Switch(TypedDict):
    """An external switch: a bridge of the host (in ``netns``, if that is not empty), or of the machine at ``ssh``.

    ``uplinks`` are those that it was registered with; the configuration has precedence.
    """

    name: str
    driver: Literal["linux-bridge", "openvswitch"]
    bridge: str
    netns: str
    ssh: SshAddress | None
    uplinks: list[SwitchUplink]


class UplinkPort(TypedDict):
    """An uplink of the host, and the switch port that its cable leads to."""

    uplink: str
    switch: str
    port: str


class SwitchView(TypedDict):
    """A registered switch. ``can``: what its driver can do beyond reading a port. ``uplinks``: those whose port it has.

    ``problem`` is what the manager found when it last read the ports of the uplinks, empty if all checks passed. ``observed`` is
    when (UTC, ISO 8601), null before the first time.
    """

    switch: Switch
    can: list[str]
    uplinks: list[UplinkPort]
    problem: str
    observed: str | None


class PortCounters(TypedDict):
    """Counters of a port; ``rx`` is from the host into the switch. A reflected frame counts in both directions."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_dropped: int
    tx_dropped: int


class PortVlan(TypedDict):
    """A VLAN of a port."""

    id: int
    pvid: bool
    untagged: bool


class PortChannel(TypedDict):
    """A VLAN of one guest behind a port, which is translated to ``switch_vlan`` (0: untagged frames) for ``mac`` alone."""

    vlan: int
    mac: str
    switch_vlan: int


class FdbEntry(TypedDict):
    """An Ethernet address that the switch reaches through a port."""

    mac: str
    vlan: int | None
    static: bool


class PairCount(TypedDict):
    """Frames from one address to another that the port reflected."""

    source: str
    target: str
    frames: int


class Neighbour(TypedDict):
    """What a neighbour announces by LLDP. ``evb``: what it claims about reflective relay, empty without that announcement."""

    system: str
    port: str
    evb: str


class SwitchPort(TypedDict):
    """A switch port. Null: the driver cannot read it. ``state`` is that of spanning tree, ``gaps`` what was not measured."""

    name: str
    up: bool
    carrier: bool
    hairpin: bool
    state: str
    isolated: bool | None
    mtu: int | None
    vlans: list[PortVlan]
    counters: PortCounters | None
    fdb: list[FdbEntry]
    pairs: list[PairCount]
    neighbour: Neighbour | None
    gaps: list[str]
    channels: list[PortChannel]


class SwitchState(TypedDict):
    """A bridge with its ports. Null: the driver has no such setting. ``other_flows`` were not created by the manager."""

    ports: list[SwitchPort]
    vlan_filtering: bool | None
    stp: bool | None
    fail_mode: str | None
    flows: int | None
    other_flows: int | None


class UplinkNeighbour(TypedDict):
    """What the switch announces by LLDP on an uplink; ``gap`` is why that is not known."""

    uplink: str
    neighbour: Neighbour | None
    gap: str


class SwitchDetails(TypedDict):
    """A switch with all its ports as they are now."""

    view: SwitchView
    state: SwitchState
    announced: list[UplinkNeighbour]


class SwitchCheck(TypedDict):
    """A checked property of a port; ``hint`` is what to do if it failed."""

    name: str
    port: str
    verdict: Literal["pass", "fail", "not measured"]
    text: str
    hint: str
