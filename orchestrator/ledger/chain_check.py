"""Verifies the event log: every event that the manager has logged is there unchanged, or was removed by the manager."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field

from orchestrator.ledger.chain import COLUMNS, START, count_removed, link, read_sequence
from orchestrator.ledger.database import Database
from orchestrator.ledger.loading import read_rows
from orchestrator.model.event import ChainReport, Event

_PAGE = 1000
_MOST_FAULTS = 8


@dataclass
class _Walk:
    """How far a verification has come."""

    wanted: int | None
    last: int = 0
    former: str | None = START  # None if unknown
    removed: int = 0  # up to the last event, as its hash covers it
    first: int = 0
    events: int = 0
    at: str | None = None
    faults: list[str] = field(default_factory=list)


def verify(database: Database, wanted: int | None = None) -> ChainReport:
    """Reads the whole log, a page at a time, so that writers of events do not wait. ``wanted``: an event whose hash to return."""
    walk = _Walk(wanted)
    while True:
        with database.reading() as db:
            db.execute("BEGIN")  # events, gaps and sequence of one moment
            try:
                rows = read_rows(db, f"SELECT {COLUMNS} FROM event WHERE id > ? ORDER BY id LIMIT {_PAGE}", walk.last)
                for row in rows:
                    _check_event(db, walk, Event(*row[:-2]), row[-2], row[-1])
                if not rows:
                    _check_end(db, walk)
                    total = count_removed(db)
            finally:
                db.execute("ROLLBACK")
        if not rows:
            break
    hidden = len(walk.faults) - _MOST_FAULTS
    faults = walk.faults[:_MOST_FAULTS] + ([f"{hidden} further faults"] if hidden > 0 else [])
    return ChainReport(walk.events, walk.first, walk.last, walk.former or "", total, tuple(faults), walk.at)


def _check_event(db: sqlite3.Connection, walk: _Walk, event: Event, removed: int, digest: str) -> None:
    if event.id != walk.last + 1:
        _enter_gap(db, walk, event.id)
    if walk.former is not None and _compute(walk.former, removed, event) != digest:
        walk.faults.append(f"event {event.id} ({event.time} {event.kind} {event.subject}) does not match its hash")
    if removed < walk.removed:
        walk.faults.append(f"event {event.id}: {removed} events removed before it, {walk.removed} before the event before it")
    walk.at = digest if event.id == walk.wanted else walk.at
    walk.first, walk.events = walk.first or event.id, walk.events + 1
    walk.last, walk.former, walk.removed = event.id, digest, removed


def _enter_gap(db: sqlite3.Connection, walk: _Walk, number: int) -> None:
    """The event before this one is not there: it was removed by the manager, or the chain is broken."""
    gap = read_rows(db, "SELECT hash FROM event_gap WHERE last = ? AND first <= ?", number - 1, walk.last + 1)
    if gap:
        walk.at = gap[0][0] if number - 1 == walk.wanted else walk.at
        walk.former = gap[0][0]
        return
    walk.faults.append(f"{_name(walk.last + 1, number - 1)} missing, and not removed by the manager")
    walk.former = None


def _check_end(db: sqlite3.Connection, walk: _Walk) -> None:
    newest, total = read_sequence(db), count_removed(db)
    if newest > walk.last:
        walk.faults.append(f"{_name(walk.last + 1, newest)} missing: no newer event exists")
    if total != walk.removed and walk.events:
        walk.faults.append(f"{total} events are recorded as removed, but the newest event confirms {walk.removed}")


def _name(first: int, last: int) -> str:
    return f"event {first} is" if first == last else f"events {first} to {last} are"


def _compute(former: str, removed: int, event: Event) -> str:
    try:
        return link(former, removed, event)
    except ValueError:  # a value that the manager does not write
        return ""
