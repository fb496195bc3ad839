"""Values of uplinks and of the traffic measurement between guests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.model.edge import EdgeMode


@dataclass(frozen=True)
class HairpinResult:
    """``returned`` of ``sent`` probe frames came back to the uplink that they left from."""

    uplink: str
    sent: int
    returned: int

    def __str__(self) -> str:
        return f"{self.uplink}: {self.returned} of {self.sent} probe frames came back from the switch"


@dataclass(frozen=True)
class FrameCounts:
    """Since the interface exists, or its driver reset it. ``sent`` is towards the external switch, ``received`` from it."""

    sent: int
    received: int
    sent_bytes: int
    received_bytes: int
    sent_dropped: int
    received_dropped: int


@dataclass(frozen=True)
class QueueCounts:
    """The queue of an interface (qdisc): frames that it has dropped, and frames that wait in it."""

    dropped: int
    waiting: int


@dataclass(frozen=True)
class ReturnCounts:
    """Frames between guests of one host, since the counting began or the guests changed.

    ``must_return`` left through the uplink, ``returned`` came in there.
    """

    must_return: int
    returned: int


class CounterPlace(StrEnum):
    """The values are part of the API."""

    GUEST = "guest"  # a guest's NIC: its VF, or its tap
    UPLINK = "uplink"
    SWITCH = "switch"  # the port of the external switch


@dataclass(frozen=True)
class CounterReading:
    """Attributes:
    name: interface, address of a VF, or port of the switch.
    guest: empty for other places.
    counts: None if they are not measured, for the reason in ``gap``.
    """

    place: CounterPlace
    name: str
    guest: str
    counts: FrameCounts | None
    gap: str = ""


@dataclass(frozen=True)
class ModeView:
    """An edge mode, and the reason why an uplink cannot have it; empty if it can."""

    mode: EdgeMode
    refused: str


@dataclass(frozen=True)
class Uplink:
    """An uplink of the host."""

    name: str
    up: bool  # administratively up with carrier
    configured: str  # the mode of the configuration, or "auto"
    edge: EdgeMode | None  # that guests get; None if they can get no NIC
    why: str  # the reason for a mode other than VEPA or for none, else empty
    modes: tuple[ModeView, ...]
    now: str  # what the NIC does between its VFs; empty without VFs
    guests: tuple[str, ...]
    override: str = ""  # set by an operator instead of `configured`: an edge mode, "auto", or empty
    managed_by: str = ""  # a program that configures the interface, such as NetworkManager; empty if none is known
    counters: tuple[CounterReading, ...] = ()  # only of a single uplink; a list of uplinks has none
    gaps: tuple[str, ...] = ()  # what the manager does not measure, and why


@dataclass(frozen=True)
class EdgeReading:
    """``findings`` are differences from what the mode requires, one sentence each."""

    interface: str  # the PF's or, with a software edge, the guest's tap
    mode: str | None  # the value of an EdgeMode, or None if it is unknown
    text: str  # what was read, or why it could not be read
    findings: tuple[str, ...] = ()
    uplink: str = ""  # of a software edge


@dataclass(frozen=True)
class Traffic:
    """Echo requests from one guest to another, as counted on the host."""

    source: str
    target: str
    size: int  # bytes of ICMP data; only requests of this size are counted
    sent: int
    received: int  # as the source reports it, like duplicates
    duplicates: int
    in_host: dict[str, int]  # requests and replies on the host's interfaces where none is expected, by interface
    dropped: int  # frames that the capture on the host lost
    source_edge: bool = False  # the source has a software edge
    target_edge: bool = False
    uplink_out: int = 0  # requests and replies that left through uplinks of software edges; not in `in_host`
    uplink_in: int = 0


class Invariant(StrEnum):
    """What counters of frames must agree on; they replace test frames, which no customer's guest sends. Part of the API."""

    GUESTS_UPLINK = "guests-uplink"  # what guests send leaves through the uplink
    UPLINK_SWITCH = "uplink-switch"  # what the uplink sends arrives at the switch port, and the other way round
    SWITCH_REFLECTED = "switch-reflected"  # what arrives at the switch port leaves it again
    MUST_RETURN = "must-return"  # what a guest sends to another one comes back to the uplink


@dataclass(frozen=True)
class InvariantReading:
    """``holds``: None if it was not measured. ``text`` has both numbers, or the reason."""

    invariant: Invariant
    uplink: str
    holds: bool | None
    text: str


class CountWay(StrEnum):
    """How frames were counted at a switch port. The values are part of the API."""

    FRAMES = "captured requests"  # exactly the counted requests
    PAIRS = "address pairs"  # requests and replies, with all other frames between the two guests
    PORT = "port counters"  # requests and replies, with all other frames of the port


@dataclass(frozen=True)
class SwitchCount:
    """Frames at a port of the external switch.

    ``others`` is how many other frames a counter that is not exact counted in an equally long time without test frames.
    """

    port: str
    into_switch: int  # from the host
    out_of_switch: int  # to the host
    dropped: int = 0  # lost by the capture
    way: CountWay = CountWay.FRAMES
    others: int = 0


@dataclass(frozen=True)
class VepaReadings:
    """The readings of the proof ``vepa``. An observer at the external switch can complete them."""

    edges: tuple[EdgeReading, ...]  # of the PFs whose VFs guests have
    traffic: Traffic | None  # None if no frames were sent
    gaps: tuple[str, ...] = ()  # reasons why a part could not be measured
    switch: SwitchCount | None = None  # as the driver of the switch counted; None if it did not
    switch_gap: str = ""  # the reason for None
    invariants: tuple[InvariantReading, ...] = ()
