"""The event log: append-only, with a limit per tenant (`retention`). A power cut may lose its last events."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from dataclasses import replace

from orchestrator.ledger.database import Database
from orchestrator.ledger.loading import read_rows
from orchestrator.ledger.retention import LONGEST, Retention
from orchestrator.model.event import EVENT_FIELDS, Event, EventKind, Visibility, utc_now

_log = logging.getLogger(__name__)

_COLUMNS = ", ".join(EVENT_FIELDS)
_WRITTEN = EVENT_FIELDS[1:]  # SQLite chooses the id
_INSERT = f"INSERT INTO event ({', '.join(_WRITTEN)}, trouble) VALUES ({', '.join('?' * (len(_WRITTEN) + 1))})"


class EventLog:
    """The events in an open ledger, for several threads. ``keep``: as ``retention.KEEP``."""

    def __init__(self, database: Database, keep: int) -> None:
        self._database = database
        self._listeners: list[Callable[[Event], object]] = []
        with database.writing("read", starts_work=False) as db:
            self._retention = Retention(db, keep)

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
        values = (*(getattr(event, name) for name in _WRITTEN), kind.is_trouble)
        with self._database.writing("log to", starts_work=True) as db:
            event = replace(event, id=int(db.execute(_INSERT, values).lastrowid or 0))
            try:
                self._retention.add(tenant, kind)
            except sqlite3.Error as error:
                # The event is logged. The next event repeats the removal.
                _log.error("cannot remove old events of the ledger %s: %s", self._database.path, error)
        for call in self._listeners:
            call(event)
        return event

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
