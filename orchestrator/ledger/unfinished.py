"""Reads which guests still need the manager: only it can clean up after them. The ledger is not changed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from orchestrator.errors import LedgerError
from orchestrator.model.state import GuestState


def read_unfinished(path: Path) -> list[tuple[str, str]]:
    """Name and state of each guest that is not stopped, or keeps changes of the host, such as a disk; empty without a ledger.

    Raises LedgerError if the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            query = "SELECT name, state FROM guest WHERE state != ? OR name IN (SELECT owner FROM undo) ORDER BY name"
            return list(db.execute(query, (GuestState.STOPPED,)))
        finally:
            db.close()
    except sqlite3.Error as error:
        raise LedgerError(f"cannot read the ledger {path}: {error}", "check the file, or move it away") from None
