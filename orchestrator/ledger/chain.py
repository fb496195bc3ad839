"""The hash chain of the event log: each event's hash covers its fields and the hash of the event before it.

The hash also covers how many events had been removed before it, so that a removal that the manager did not make is seen. A row
of the table event_gap stands for removed events with consecutive ids; its hash is that of the last of them, to which the next
event is linked.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator.canonical import canonicalize
from orchestrator.model.event import EVENT_FIELDS, Event

START = hashlib.sha256(b"nohype event chain 1").hexdigest()
"""The hash before the first event."""

COLUMNS = f"{', '.join(EVENT_FIELDS)}, removed, hash"
_PAGE = 1000


@dataclass(frozen=True)
class Head:
    """The newest event: its id and hash, and the number of events removed so far."""

    id: int
    hash: str
    removed: int


def link(former: str, removed: int, event: Event) -> str:
    """The hash of an event: SHA-256 of canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonicalize([former, removed, event.to_json()])).hexdigest()


def read_head(db: sqlite3.Connection) -> Head:
    """An id is never used again, also if the newest events are missing: the hole is found by `verify`."""
    last = _rows(db, "SELECT id, hash FROM event ORDER BY id DESC LIMIT 1")
    (number, digest) = last[0] if last else (0, START)
    return Head(max(number, read_sequence(db)), digest, count_removed(db))


def count_removed(db: sqlite3.Connection) -> int:
    return int(_rows(db, "SELECT coalesce(sum(last - first + 1), 0) FROM event_gap")[0][0])


def add_gaps(db: sqlite3.Connection, removed: Iterable[tuple[int, str]]) -> None:
    """Records removed events, (id, hash) in the order of ids, within their transaction. Neighbouring gaps become one."""
    for first, last, digest in list(_find_runs(removed)):
        before = _rows(db, "SELECT first FROM event_gap WHERE last = ?", first - 1)
        after = _rows(db, "SELECT last, hash FROM event_gap WHERE first = ?", last + 1)
        db.execute("DELETE FROM event_gap WHERE last = ? OR first = ?", (first - 1, last + 1))
        end, anchor = after[0] if after else (last, digest)
        db.execute("INSERT INTO event_gap VALUES (?, ?, ?)", (before[0][0] if before else first, end, anchor))


def _find_runs(removed: Iterable[tuple[int, str]]) -> Iterator[tuple[int, int, str]]:
    run: tuple[int, int, str] | None = None
    for number, digest in removed:
        if run and number == run[1] + 1:
            run = run[0], number, digest
        else:
            if run:
                yield run
            run = number, number, digest
    if run:
        yield run


def link_all(db: sqlite3.Connection) -> None:
    """Links the events of a log that had no chain, within the transaction of a migration; the hash does not exist yet in any row.

    Removed events leave gaps without their hashes. A damaged log stays without hashes from the damage on.
    """
    last, former, removed = 0, START, 0
    with tolerated_damage():
        while rows := _rows(db, f"SELECT {', '.join(EVENT_FIELDS)} FROM event WHERE id > ? ORDER BY id LIMIT {_PAGE}", last):
            links = []
            for event in (Event(*row) for row in rows):
                if event.id > last + 1:
                    db.execute("INSERT INTO event_gap VALUES (?, ?, ?)", (last + 1, event.id - 1, former))
                    removed += event.id - 1 - last
                last, former = event.id, link(former, removed, event)
                links.append((removed, former, last))
            db.executemany("UPDATE event SET removed = ?, hash = ? WHERE id = ?", links)


@contextmanager
def tolerated_damage() -> Iterator[None]:
    """Ends the block at damaged pages: a damaged event log must not prevent the manager's start."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise


def read_sequence(db: sqlite3.Connection) -> int:
    """The highest id ever used (https://sqlite.org/autoinc.html)."""
    rows = _rows(db, "SELECT seq FROM sqlite_sequence WHERE name = 'event'")
    return int(rows[0][0]) if rows else 0


def _rows(db: sqlite3.Connection, statement: str, *values: object) -> list[Any]:
    return db.execute(statement, values).fetchall()
