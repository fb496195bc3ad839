"""Counters of guests' cores at their last starts. Not in memory: only audits read them."""

from __future__ import annotations

import json
from uuid import UUID

from orchestrator.ledger.database import Database
from orchestrator.ledger.loading import parse_core_start, read_rows
from orchestrator.model.core_start import CoreStart
from orchestrator.model.plain import to_plain
from orchestrator.model.plan import Plan


class CoreStarts:
    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, uuid: UUID) -> CoreStart | None:
        """None without a record. It may be of an earlier run of the guest: compare boot, process and its start."""
        statement = "SELECT guest, record FROM core_start JOIN guest ON guest = name WHERE json_extract(plan, '$.uuid') = ?"
        with self._database.reading() as db:
            for guest, text in read_rows(db, statement, str(uuid)):
                return parse_core_start(guest, text)
        return None

    def record(self, plan: Plan, start: CoreStart) -> None:
        """Replaces the record of an earlier run; nothing if the guest was deleted meanwhile. Not a change of the guest."""
        condition = "name = ?1 AND json_extract(plan, '$.uuid') = ?2"
        statement = f"INSERT OR REPLACE INTO core_start SELECT name, ?3 FROM guest WHERE {condition}"
        values = (plan.name, str(plan.uuid), json.dumps(to_plain(start)))
        self._database.write(f"record the counters of {plan.name}'s cores in", statement, *values)
