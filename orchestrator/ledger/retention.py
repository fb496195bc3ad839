"""Limits the event log per tenant, so that no tenant can displace another's events or fill the disk."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.ledger.chain import add_gaps, tolerated_damage
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
        with tolerated_damage():  # uncounted events are not removed
            for tenant, trouble, count in db.execute("SELECT tenant, trouble, count(*) FROM event GROUP BY tenant, trouble"):
                self._counts[tenant, bool(trouble)] = count

    def is_full(self, tenant: str, kind: EventKind) -> bool:
        """The next event of this tenant and class is above the limit."""
        return self._counts[tenant, kind.is_trouble] + 1 >= self._keep + STEP

    def add(self, tenant: str, kind: EventKind) -> None:
        """Counts a written event."""
        self._counts[tenant, kind.is_trouble] += 1

    @contextmanager
    def removing(self, tenant: str, kind: EventKind) -> Iterator[int]:
        """Removes the oldest events of a tenant and class, and yields their number, within the transaction of the block.

        In one transaction, so that neither other connections nor a recovery see the table without its trigger, or a chain whose
        newest event does not confirm the removal. Raises sqlite3.Error if the removal fails; nothing is removed then.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("DROP TRIGGER event_no_delete")
            oldest = "SELECT id, hash FROM event WHERE tenant = ? AND trouble = ? ORDER BY id LIMIT ?"
            rows = self._db.execute(oldest, (tenant, kind.is_trouble, STEP)).fetchall()
            self._db.executemany("DELETE FROM event WHERE id = ?", [(number,) for number, _ in rows])
            add_gaps(self._db, rows)
            self._db.execute(EVENT_NO_DELETE)
            yield len(rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._counts[tenant, kind.is_trouble] -= len(rows)
