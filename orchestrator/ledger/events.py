"""The event log: append-only, with a limit per tenant (`retention`). A power cut may lose its last events."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from dataclasses import replace

from orchestrator.ledger.chain import Head, count_removed, link, read_head, tolerated_damage
from orchestrator.ledger.chain_check import verify
from orchestrator.ledger.database import Database
from orchestrator.ledger.loading import read_rows
from orchestrator.ledger.retention import LONGEST, Retention
from orchestrator.model.event import EVENT_FIELDS, ChainReport, Event, EventKind, Visibility, utc_now

_log = logging.getLogger(__name__)

_COLUMNS = ", ".join(EVENT_FIELDS)
_INSERT = f"INSERT INTO event ({_COLUMNS}, trouble, removed, hash) VALUES ({', '.join('?' * (len(EVENT_FIELDS) + 3))})"


class EventLog:
    """The events in an open ledger, for several threads. ``keep``: as ``retention.KEEP``."""

    def __init__(self, database: Database, keep: int) -> None:
        self._database = database
        self._listeners: list[Callable[[Event], object]] = []
        self._head: Head | None = None  # None if it must be read
        with database.writing("read", starts_work=False) as db:
            self._retention = Retention(db, keep)
            with tolerated_damage():
                self._head = read_head(db)

    def subscribe(self, call: Callable[[Event], object]) -> None:
        """Calls ``call`` after each commit of an event, in the thread that logged it."""
        self._listeners.append(call)

    def append(
        self, kind: EventKind, subject: str, detail: str, *, who: str = "manager", tenant: str = "", took: float | None = None
    ) -> Event:
        kind = EventKind(kind)  # ValueError for a text that is not a kind
        detail = detail if len(detail) <= LONGEST else f"{detail[:LONGEST]}..."
        tenant = "" if kind.visibility is Visibility.HIDDEN else tenant
        event = Event(0, utc_now(), kind, subject, detail, who, tenant, took)
        with self._database.writing("log to", starts_work=True) as db:
            event = self._append(db, event, kind)
            self._retention.add(tenant, kind)
        for call in self._listeners:
            call(event)
        return event

    def _append(self, db: sqlite3.Connection, event: Event, kind: EventKind) -> Event:
        """Within `writing`. Removes old events in the transaction of the new event, whose hash confirms the removal."""
        if self._retention.is_full(event.tenant, kind):
            try:
                with self._retention.removing(event.tenant, kind) as count:
                    return self._insert(db, event, count)
            except sqlite3.Error as error:
                # The next event repeats the removal.
                self._head = None
                _log.error("cannot remove old events of the ledger %s: %s", self._database.path, error)
        try:
            return self._insert(db, event, 0)
        except sqlite3.IntegrityError:
            # Another program has written events. The chain shows it, but this event is logged in any case.
            self._head = None
            return self._insert(db, event, 0)

    def _insert(self, db: sqlite3.Connection, event: Event, newly_removed: int) -> Event:
        head = self._head or read_head(db)
        removed = count_removed(db) if newly_removed else head.removed
        event = replace(event, id=head.id + 1)
        digest = link(head.hash, removed, event)
        values = (*(getattr(event, name) for name in EVENT_FIELDS), EventKind(event.kind).is_trouble, removed, digest)
        db.execute(_INSERT, values)
        self._head = Head(event.id, digest, removed)
        return event

    def read_chain(self, at: int | None = None) -> ChainReport:
        """Verifies the whole log. ``at``: an event whose hash to return."""
        return verify(self._database, at)

    def read_synced_head(self) -> Head:
        """The newest event, after it is on the disk: a head that is signed must not be lost by a power cut."""
        with self._database.writing("read", starts_work=False) as db:
            head, number = read_head(db), self._database.note_written()
        self._database.wait_synced(number)
        return head

    def read(self, after: int | None = 0, limit: int = 1000, tenant: str | None = None) -> tuple[Event, ...]:
        """Oldest first. ``after``: events with higher ids, or the newest if None. ``tenant``: None for all."""
        where, values = ("tenant = ? AND id > ?", [tenant]) if tenant is not None else ("id > ?", [])
        order = "DESC" if after is None else "ASC"
        with self._database.reading() as db:
            statement = f"SELECT {_COLUMNS} FROM event WHERE {where} ORDER BY id {order} LIMIT ?"
            rows = [Event(*row) for row in read_rows(db, statement, *values, after or 0, limit)]
            return tuple(rows[::-1] if after is None else rows)

    def last_id(self) -> int:
        with self._database.reading() as db:
            return int(read_rows(db, "SELECT coalesce(max(id), 0) FROM event")[0][0])
