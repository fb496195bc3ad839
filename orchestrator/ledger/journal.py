"""The undo journal. Each undo record is written before its change to the host is made.

A record outlives the process, not a power cut: a power cut itself undoes the changes to a host. Records of changes that
outlive it, such as those of a disk's contents, are ``durable``.
"""

from __future__ import annotations

import json

from orchestrator.errors import NotFound
from orchestrator.ledger.database import Database
from orchestrator.ledger.loading import parse_arguments, read_rows
from orchestrator.model.claim import UndoRecord


class UndoJournal:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, owner: str, action: str, arguments: dict[str, object], *, durable: bool = False) -> int:
        """Returns the record's id. ``arguments``: plain JSON types. ``durable``: returns when the record is on the disk."""
        statement = "INSERT INTO undo (owner, action, arguments) VALUES (?, ?, ?)"
        with self._database.writing(f"record {action} in", starts_work=True) as db:
            id = int(db.execute(statement, (owner, action, json.dumps(arguments))).lastrowid or 0)
            number = self._database.note_written()
        if durable:
            self._database.wait_synced(number)
        return id

    def drop(self, id: int) -> None:
        statement = "DELETE FROM undo WHERE id = ?"
        if not self._database.write("drop an undo record in", statement, id, starts_work=False).rowcount:
            raise NotFound(f"there is no undo record {id}")

    def read(self, owner: str) -> tuple[UndoRecord, ...]:
        """The owner's undo records, newest first."""
        with self._database.reading() as db:
            rows = read_rows(db, "SELECT id, owner, action, arguments FROM undo WHERE owner = ? ORDER BY id DESC", owner)
            return tuple(UndoRecord(id, owner, action, parse_arguments(owner, text)) for id, owner, action, text in rows)
