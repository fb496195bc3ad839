"""What is measured of the traffic between guests: edge modes of the PFs, and counted frames. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EdgeReading:
    """Edge mode of a PF.

    Attributes:
        mode: ``vepa``, ``veb``, or None if it is unknown.
        text: what was read, or why it could not be read.
    """

    interface: str
    mode: str | None
    text: str


@dataclass(frozen=True)
class Traffic:
    """Echo requests from one guest to another, as counted on the host.

    Attributes:
        source, target: names of the guests.
        size: bytes of ICMP data; only requests of this size are counted.
        sent, received, duplicates: requests, replies and duplicate replies, as the source reports them.
        in_host: requests and replies that the host's own network stack received, by interface.
        dropped: frames that the capture on the host lost.
    """

    source: str
    target: str
    size: int
    sent: int
    received: int
    duplicates: int
    in_host: dict[str, int]
    dropped: int


@dataclass(frozen=True)
class VepaReadings:
    """The host's half of the proof ``vepa``; the other half is counted at the external switch.

    Attributes:
        edges: the PFs whose VFs guests have.
        traffic: None if no frames were sent.
        gaps: reasons why a part could not be measured.
    """

    edges: tuple[EdgeReading, ...]
    traffic: Traffic | None
    gaps: tuple[str, ...] = ()


def readings_from_json(fields: Mapping[str, Any] | None) -> VepaReadings | None:
    """The readings that ``to_plain`` made plain."""
    if fields is None:
        return None
    return VepaReadings(
        edges=tuple(EdgeReading(**edge) for edge in fields["edges"]),
        traffic=Traffic(**fields["traffic"]) if fields["traffic"] else None,
        gaps=tuple(fields["gaps"]),
    )
