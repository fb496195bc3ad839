"""Limits the event log. Each tenant has its own limit, so that no tenant can displace another's events or fill the disk."""

from __future__ import annotations

import sqlite3
from collections import Counter

from orchestrator.ledger.schema import EVENT_NO_DELETE
from orchestrator.model.event import EventKind

KEEP = 20_000
"""Of each tenant, and of the host, whose tenant is empty; and once more as many of those that tell of trouble."""

LONGEST = 2000
"""Characters of an event's detail."""

STEP = 256
"""Events that are removed at a time."""


class Retention:
    """Counts the events, and removes the oldest of those that are too many.

    Args:
        db: is written by one thread at a time.
        keep: as ``KEEP``.
    """

    def __init__(self, db: sqlite3.Connection, keep: int) -> None:
        self._db, self._keep = db, keep
        self._counts: Counter[tuple[str, bool]] = Counter()
        try:
            for tenant, trouble, count in db.execute("SELECT tenant, trouble, count(*) FROM event GROUP BY tenant, trouble"):
                self._counts[tenant, bool(trouble)] = count
        except sqlite3.DatabaseError as error:
            # A damaged log keeps no manager from starting. What was not counted is not removed.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise

    def add(self, tenant: str, kind: EventKind) -> None:
        """Counts an event that was written; removes older ones of its tenant and sort if there are too many.

        Raises:
            sqlite3.Error: they can't be removed; it is tried again with the next.
        """
        key = tenant, kind.is_trouble
        self._counts[key] += 1
        if self._counts[key] >= self._keep + STEP:
            self._counts[key] -= self._remove(key)

    def _remove(self, key: tuple[str, bool]) -> int:
        """In one transaction: other connections, and a recovery after a kill, never see the table without its trigger."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("DROP TRIGGER event_no_delete")
            oldest = "SELECT id FROM event WHERE tenant = ? AND trouble = ? ORDER BY id LIMIT ?"
            removed = self._db.execute(f"DELETE FROM event WHERE id IN ({oldest})", (*key, STEP)).rowcount
            self._db.execute(EVENT_NO_DELETE)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return removed
