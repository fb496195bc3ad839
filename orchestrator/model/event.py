"""Events of guests and of the host."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import Enum, StrEnum, auto


class Visibility(Enum):
    """What a tenant sees of an event about its own guest."""

    FULL = auto()
    REDACTED = auto()
    """The event without its detail, in which kernel and libvirt may name other tenants' guests and devices."""
    HIDDEN = auto()
    """Nothing: the event is stored without a tenant."""


class EventKind(StrEnum):
    """The values are part of the API. ``severity`` is a log level."""

    severity: int
    visibility: Visibility

    def __new__(cls, value: str, severity: int = logging.INFO, visibility: Visibility = Visibility.FULL) -> EventKind:
        member = str.__new__(cls, value)
        member._value_ = value
        member.severity, member.visibility = severity, visibility
        return member

    CLAIMED = "claimed"
    REFUSED = "refused"
    PLAN_FAILED = "plan-failed", logging.WARNING, Visibility.REDACTED
    STARTED = "started"
    FAILED = "failed", logging.WARNING, Visibility.REDACTED
    STOPPED = "stopped"
    ENDED = "ended"
    WIPING = "wiping"
    DELETED = "deleted"
    QUARANTINED = "quarantined", logging.WARNING, Visibility.REDACTED
    CLEARED = "cleared"
    NETWORK_CREATED = "network-created"
    NETWORK_DELETED = "network-deleted"
    UPLINK_SET = "uplink-set", logging.INFO, Visibility.HIDDEN
    UNDO_FAILED = "undo-failed", logging.WARNING, Visibility.HIDDEN
    NOT_RESTORED = "not-restored", logging.WARNING, Visibility.HIDDEN
    GAVE_UP = "gave-up", logging.WARNING
    HOST_WARNING = "host-warning", logging.WARNING, Visibility.HIDDEN
    SWITCH_CHANGED = "switch-changed", logging.WARNING, Visibility.HIDDEN
    DUPLICATE_ADDRESS = "duplicate-address", logging.WARNING, Visibility.HIDDEN
    HAIRPIN_LOST = "hairpin-lost", logging.WARNING, Visibility.HIDDEN
    HAIRPIN_RETURNED = "hairpin-returned", logging.INFO, Visibility.HIDDEN
    DISENGAGED = "disengaged"
    EXIT_POLICY = "exit-policy", logging.WARNING
    DRIFTED = "drifted", logging.WARNING
    ADOPT = "adopt"
    FINISH = "finish"
    UNDO = "undo"
    QUARANTINE = "quarantine"

    @property
    def is_trouble(self) -> bool:
        """Events from WARNING on have their own share of the event log (`ledger.retention`)."""
        return self.severity >= logging.WARNING


@dataclass(frozen=True)
class Event:
    """An entry of the event log. Column list, JSON and journal fields are derived from these attributes."""

    id: int
    time: str  # UTC in ISO 8601
    kind: str  # value of an EventKind, or another text from a manager of another version
    subject: str  # a guest's name or "host"
    detail: str
    who: str  # name of the caller; "manager" for what was not requested
    tenant: str  # owner of the subject, empty for the host's own
    took: float | None  # seconds, None if the event has no duration

    @property
    def severity(self) -> int:
        known = _find_kind(self.kind)
        return known.severity if known else logging.INFO

    def redacted(self) -> Event:
        """The event as its tenant sees it, without detail if the kind is unknown."""
        known = _find_kind(self.kind)
        if known and known.visibility is Visibility.FULL:
            return self
        return replace(self, detail="ask the operator of the host for the reason")

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in EVENT_FIELDS}


@dataclass(frozen=True)
class ChainReport:
    """The hash chain of the event log, verified.

    Attributes:
        events, removed: number of events in the log, and of events removed from it.
        first, last: ids of the oldest and the newest event in the log; 0 without events.
        hash: of the last event, in hexadecimal.
        faults: each place where the chain is broken; empty if it is intact.
        at: the hash of the event that was asked for; None if it is not in the log.
    """

    events: int
    first: int
    last: int
    hash: str
    removed: int
    faults: tuple[str, ...]
    at: str | None = None


EVENT_FIELDS = tuple(field.name for field in fields(Event))


def utc_now() -> str:
    """ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _find_kind(kind: str) -> EventKind | None:
    try:
        return EventKind(kind)
    except ValueError:
        return None
