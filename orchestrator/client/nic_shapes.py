"""Types of the responses about NICs, uplinks and the frames between guests; `shapes` has all types."""

from __future__ import annotations

from typing import Literal, TypedDict


class Vf(TypedDict):
    """A guest's virtual function: PF, network interface of the PF, number, PCI and Ethernet address, VLAN and rate as in Nic."""

    pf: str
    interface: str
    index: int
    address: str
    mac: str
    vlan: int
    rate: int


class Nic(TypedDict):
    """A guest's NIC: a virtual function or, with a software edge, a virtio NIC; ``pf``, ``index`` and ``address`` are null then.

    ``interface`` is the uplink, ``tap`` the host's interface of a virtio NIC, ``network`` the tenant network, ``vlan`` the port
    VLAN (0 for none), ``rate`` the limit for sending in Mbit/s (0 for none). With edge mode channel the switch translates
    ``vlan`` to ``switch_vlan``, or to untagged frames if that is 0.
    """

    pf: str | None
    interface: str
    index: int | None
    address: str | None
    mac: str
    edge: Literal["veb", "vepa", "channel", "macvtap-vepa", "nft-vepa"]
    network: str
    vlan: int
    rate: int
    tap: str
    switch_vlan: int


class ModeView(TypedDict):
    """An edge mode, and why an uplink cannot have it; empty if it can."""

    mode: Literal["veb", "vepa", "channel", "macvtap-vepa", "nft-vepa"]
    refused: str


class FrameCounts(TypedDict):
    """Frames since the interface exists. ``sent`` is towards the external switch, ``received`` from it."""

    sent: int
    received: int
    sent_bytes: int
    received_bytes: int
    sent_dropped: int
    received_dropped: int


class CounterReading(TypedDict):
    """Frames of a guest's NIC (its tap, or the address of its VF), of the uplink, or of the switch port.

    ``counts`` is null for the reason in ``gap``.
    """

    place: Literal["guest", "uplink", "switch"]
    name: str
    guest: str
    counts: FrameCounts | None
    gap: str


class Uplink(TypedDict):
    """An uplink. ``edge`` is the mode that guests get, null for none; ``configured`` may be `auto`. ``why`` is the reason for a
    software edge, or for none. ``now`` is what the NIC does between its VFs. ``override`` is the mode that an operator has set
    instead of ``configured``, empty for none; ``managed_by`` a program that configures the interface, empty if none is known.
    ``counters`` is empty in a list of uplinks. ``gaps`` is what the manager does not measure, and why.
    """

    name: str
    up: bool
    configured: str
    edge: Literal["veb", "vepa", "channel", "macvtap-vepa", "nft-vepa"] | None
    why: str
    modes: list[ModeView]
    now: str
    guests: list[str]
    override: str
    managed_by: str
    counters: list[CounterReading]
    gaps: list[str]


class HairpinResult(TypedDict):
    """``returned`` of ``sent`` probe frames came back from the external switch."""

    uplink: str
    sent: int
    returned: int


class EdgeReading(TypedDict):
    """Edge mode of a PF or of a guest's tap, null if it is unknown; `text` is what was read, or why it could not be read.

    `findings` are differences from what a software edge requires, and `uplink` is its uplink.
    """

    interface: str
    mode: str | None
    text: str
    findings: list[str]
    uplink: str


class Traffic(TypedDict):
    """Frames that one guest sent to another, counted on the host.

    ``uplink_out`` and ``uplink_in`` count on the uplinks of software edges; ``in_host`` on all interfaces where none is expected.
    """

    source: str
    target: str
    size: int
    sent: int
    received: int
    duplicates: int
    in_host: dict[str, int]
    dropped: int
    source_edge: bool
    target_edge: bool
    uplink_out: int
    uplink_in: int


class SwitchCount(TypedDict):
    """Frames at a port of the external switch. Counters also count ``others``: as many as in a time without test frames."""

    port: str
    into_switch: int
    out_of_switch: int
    dropped: int
    way: Literal["captured requests", "address pairs", "port counters"]
    others: int


class InvariantReading(TypedDict):
    """What counters of frames must agree on. ``holds`` is null if it was not measured."""

    invariant: Literal["guests-uplink", "uplink-switch", "switch-reflected", "must-return"]
    uplink: str
    holds: bool | None
    text: str


class VepaReadings(TypedDict):
    """The readings of the proof `vepa`. ``switch`` is what the external switch counted, null for the reason in ``switch_gap``."""

    edges: list[EdgeReading]
    traffic: Traffic | None
    gaps: list[str]
    switch: SwitchCount | None
    switch_gap: str
    invariants: list[InvariantReading]
