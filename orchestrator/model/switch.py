"""External switches: how the manager reaches them, and what it reads of their ports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from orchestrator.model.proof import Verdict


class SwitchDriver(StrEnum):
    LINUX_BRIDGE = "linux-bridge"
    OPENVSWITCH = "openvswitch"


@dataclass(frozen=True)
class SshAddress:
    """``host_key`` is the public key of the switch, ``ssh-ed25519 AAAA...``: no other key is accepted."""

    host: str
    port: int
    user: str
    host_key: str

    def __str__(self) -> str:
        return f"{self.user}@{self.host} port {self.port}"


@dataclass(frozen=True)
class SwitchUplink:
    """An uplink of this host, and the port of a registered switch that its cable leads to."""

    uplink: str
    port: str


@dataclass(frozen=True)
class Switch:
    """A registered switch: one bridge, on this host or reached over SSH."""

    name: str
    driver: SwitchDriver
    bridge: str
    netns: str = ""  # network namespace of a bridge on this host; empty for that of the manager
    ssh: SshAddress | None = None  # None for a bridge on this host
    uplinks: tuple[SwitchUplink, ...] = ()  # in addition to those of the configuration, which has precedence


@dataclass(frozen=True)
class UplinkPort:
    """An uplink of this host, and the switch port that its cable leads to."""

    uplink: str
    switch: str
    port: str


@dataclass(frozen=True)
class SwitchTie:
    """The switch port of an uplink, with what opens its driver. ``key``: the manager's private SSH key, None without one."""

    switch: Switch
    port: str
    key: Path | None

    @property
    def is_local(self) -> bool:
        """The port is an interface in the network namespace of the manager."""
        return self.switch.ssh is None and not self.switch.netns


@dataclass(frozen=True)
class SwitchSettings:
    """The operator's configuration. ``key``: file with the manager's private SSH key, empty without one."""

    key: str = ""
    uplinks: tuple[UplinkPort, ...] = ()
    channels: frozenset[str] = frozenset()  # uplinks that are configured for the edge mode channel


@dataclass(frozen=True)
class PortCounters:
    """Since the port exists. ``rx`` is from the host into the switch; frames that go back out of the port count in both."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_dropped: int
    tx_dropped: int


@dataclass(frozen=True)
class PortVlan:
    id: int
    pvid: bool  # untagged frames of the host belong to this VLAN
    untagged: bool  # frames to the host leave without a tag


@dataclass(frozen=True)
class PortChannel:
    """A VLAN that one VF of the host has alone (edge mode channel), and that the switch translates.

    Attributes:
        mac: of the guest; the switch accepts no other source in the VLAN. Empty if the driver does not check it.
        switch_vlan: the VLAN of the switch that it is translated to; 0 for untagged frames.
    """

    vlan: int
    mac: str
    switch_vlan: int


@dataclass(frozen=True)
class FdbEntry:
    """An Ethernet address that the switch reaches through the port."""

    mac: str
    vlan: int | None
    static: bool


@dataclass(frozen=True)
class PairCount:
    """Frames from one address to another that went back out of the port they came in on."""

    source: str
    target: str
    frames: int


@dataclass(frozen=True)
class Neighbour:
    """What the station at the other end of the cable announces by LLDP (IEEE 802.1AB).

    Attributes:
        evb: the announced state of reflective relay (EVB TLV, IEEE 802.1Qbg), empty without the TLV. It is only a claim.
    """

    system: str
    port: str
    evb: str


@dataclass(frozen=True)
class SwitchPort:
    """A port as the switch reports it. None: the driver cannot read it."""

    name: str
    up: bool
    carrier: bool
    hairpin: bool
    state: str  # of spanning tree: forwarding, blocking, ...
    isolated: bool | None
    mtu: int | None
    vlans: tuple[PortVlan, ...]
    counters: PortCounters | None
    fdb: tuple[FdbEntry, ...]
    pairs: tuple[PairCount, ...]
    neighbour: Neighbour | None
    gaps: tuple[str, ...] = ()  # what was not measured, and why
    channels: tuple[PortChannel, ...] = ()


@dataclass(frozen=True)
class SwitchState:
    """A bridge with some of its ports. None: the driver has no such setting."""

    ports: tuple[SwitchPort, ...]
    vlan_filtering: bool | None
    stp: bool | None
    fail_mode: str | None  # of Open vSwitch: secure, standalone
    flows: int | None  # of Open vSwitch: flows that the manager created
    other_flows: int | None  # of Open vSwitch: flows that others created


@dataclass(frozen=True)
class PortNeeds:
    """What guests need of a port.

    Attributes:
        relay: reflective relay; not needed if each guest has a VLAN of its own.
        channels: the translations for running guests.
        known: those for all guests of the manager: they are set shortly before a guest runs.
        vlans: of networks that running guests are in, tagged at the port.
    """

    relay: bool = True
    channels: tuple[PortChannel, ...] = ()
    known: tuple[PortChannel, ...] = ()
    vlans: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SwitchCheck:
    """One checked property of a port. ``hint`` is what to do; empty after a pass."""

    name: str
    port: str
    verdict: Verdict
    text: str
    hint: str = ""


@dataclass(frozen=True)
class SwitchView:
    """A registered switch as callers see it.

    Attributes:
        can: what its driver can do beyond reading.
        uplinks: the uplinks of this host that are tied to it.
        problem: the last state that the manager observed: empty if all checks passed.
    """

    switch: Switch
    can: tuple[str, ...]
    uplinks: tuple[UplinkPort, ...]
    problem: str
    observed: str | None  # UTC, ISO 8601; None if it was not observed yet


@dataclass(frozen=True)
class UplinkNeighbour:
    """What the switch announces on an uplink of this host by LLDP. ``gap`` is why it is not known."""

    uplink: str
    neighbour: Neighbour | None
    gap: str


@dataclass(frozen=True)
class SwitchDetails:
    view: SwitchView
    state: SwitchState
    announced: tuple[UplinkNeighbour, ...]
