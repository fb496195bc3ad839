"""Limits the event log per tenant, so that no tenant can displace another's events or fill the disk."""

from __future__ import annotations

import sqlite3
from collections import Counter

from orchestrator.ledger.schema import EVENT_NO_DELETE
from orchestrator.model.event import EventKind

KEEP = 20_000
"""Events kept per tenant ("" for the host): this many ordinary events and, separately, this many trouble events."""

LONGEST = 2000
"""Maximum length of an event's detail in characters."""

STEP = 256
"""Number of events per removal."""


class Retention:
    """Counts events and removes the oldest above the limit. ``db`` is written by one thread at a time."""

    def __init__(self, db: sqlite3.Connection, keep: int) -> None:
        self._db, self._keep = db, keep
        self._counts: Counter[tuple[str, bool]] = Counter()
        try:
            for tenant, trouble, count in db.execute("SELECT tenant, trouble, count(*) FROM event GROUP BY tenant, trouble"):
                self._counts[tenant, bool(trouble)] = count
        except sqlite3.DatabaseError as error:
            # A damaged event log must not prevent the manager's start. Uncounted events are not removed.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise

    def add(self, tenant: str, kind: EventKind) -> None:
        """Counts a written event, and removes older events of its tenant and class above the limit.

        Raises sqlite3.Error if the removal fails; the next event repeats it.
        """
        key = tenant, kind.is_trouble
        self._counts[key] += 1
        if self._counts[key] >= self._keep + STEP:
            self._counts[key] -= self._remove(key)

    def _remove(self, key: tuple[str, bool]) -> int:
        """In one transaction, so that neither other connections nor a recovery see the table without its trigger."""
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
