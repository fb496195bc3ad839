"""Events: what happened to a guest or to the host."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import Enum, StrEnum, auto


class Visibility(Enum):
    """What a tenant sees of an event about its own guest."""

    FULL = auto()
    REDACTED = auto()
    """That it happened. The detail may name other tenants' guests and devices, as the kernel and libvirt do."""
    HIDDEN = auto()
    """Nothing: the event is stored without a tenant."""


class EventKind(StrEnum):
    """What happened. The values are part of the API.

    Attributes:
        severity: log level. Events from WARNING on have their own share of the event log (`ledger.retention`).
        visibility: what a tenant sees of it.
    """

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
    DELETED = "deleted"
    QUARANTINED = "quarantined", logging.WARNING, Visibility.REDACTED
    CLEARED = "cleared"
    UNDO_FAILED = "undo-failed", logging.WARNING, Visibility.HIDDEN
    NOT_RESTORED = "not-restored", logging.WARNING, Visibility.HIDDEN
    GAVE_UP = "gave-up", logging.WARNING
    HOST_WARNING = "host-warning", logging.WARNING, Visibility.HIDDEN
    DRIFTED = "drifted", logging.WARNING
    ADOPT = "adopt"
    FINISH = "finish"
    UNDO = "undo"
    QUARANTINE = "quarantine"

    @property
    def is_trouble(self) -> bool:
        """Whether an operator must look at it."""
        return self.severity >= logging.WARNING


@dataclass(frozen=True)
class Event:
    """An entry of the event log. Column list, JSON and journal fields are derived from these attributes.

    Attributes:
        time: UTC in ISO 8601.
        kind: value of an EventKind; another text if a manager of another version wrote it.
        subject: a guest's name or "host".
        detail: what was decided and why, what changed.
        who: name of the caller; "manager" for what was not requested.
        tenant: owner of the subject, empty for the host's own.
        took: seconds, None if the event has no duration.
    """

    id: int
    time: str
    kind: str
    subject: str
    detail: str
    who: str
    tenant: str
    took: float | None

    @property
    def severity(self) -> int:
        """Log level."""
        known = _find_kind(self.kind)
        return known.severity if known else logging.INFO

    def redacted(self) -> Event:
        """The event as its tenant sees it. The detail of an unknown kind is not shown."""
        known = _find_kind(self.kind)
        if known and known.visibility is Visibility.FULL:
            return self
        return replace(self, detail="the operator of the host can see why")

    def to_json(self) -> dict[str, object]:
        """The event as plain JSON types."""
        return {name: getattr(self, name) for name in EVENT_FIELDS}


EVENT_FIELDS = tuple(field.name for field in fields(Event))


def utc_now() -> str:
    """The time for an event, in ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _find_kind(kind: str) -> EventKind | None:
    try:
        return EventKind(kind)
    except ValueError:
        return None
