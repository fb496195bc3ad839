"""Values of the traffic measurement between guests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EdgeReading:
    interface: str
    mode: str | None  # vepa, veb, or None if it is unknown
    text: str  # what was read, or why it could not be read


@dataclass(frozen=True)
class Traffic:
    """Echo requests from one guest to another, as counted on the host."""

    source: str
    target: str
    size: int  # bytes of ICMP data; only requests of this size are counted
    sent: int
    received: int  # as the source reports it, like duplicates
    duplicates: int
    in_host: dict[str, int]  # requests and replies that the host's own network stack received, by interface
    dropped: int  # frames that the capture on the host lost


@dataclass(frozen=True)
class VepaReadings:
    """The host's half of the proof ``vepa``; the other half is counted at the external switch."""

    edges: tuple[EdgeReading, ...]  # of the PFs whose VFs guests have
    traffic: Traffic | None  # None if no frames were sent
    gaps: tuple[str, ...] = ()  # reasons why a part could not be measured
