"""The ledger's tables and how older ones become newer ones. Nothing is written to a file that is not a ledger."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import LedgerError, RequestError
from orchestrator.values import Size

_APPLICATION = 0x4E48

# The primary keys of claim_*: no bug elsewhere can promise one thing to two guests.
_TABLES_1 = """
CREATE TABLE generation (id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL) STRICT;
INSERT INTO generation VALUES (1, 0);
CREATE TABLE guest (name TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('claimed', 'running', 'stopping')),
    plan TEXT NOT NULL) STRICT;
CREATE TABLE claim_cpu (cpu INTEGER PRIMARY KEY, guest TEXT NOT NULL REFERENCES guest ON DELETE CASCADE) STRICT;
CREATE TABLE claim_vf (address TEXT PRIMARY KEY, guest TEXT NOT NULL REFERENCES guest ON DELETE CASCADE) STRICT;
CREATE TABLE claim_mac (mac TEXT PRIMARY KEY, guest TEXT NOT NULL REFERENCES guest ON DELETE CASCADE) STRICT;
CREATE TABLE undo (id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, action TEXT NOT NULL,
    arguments TEXT NOT NULL) STRICT;
CREATE TABLE event (id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL,
    detail TEXT NOT NULL) STRICT;
CREATE TRIGGER event_no_update BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER event_no_delete BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""

_TABLES_2 = """
CREATE TABLE guest_2 (name TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN
    ('creating', 'starting', 'running', 'stopping', 'stopped', 'deleting', 'quarantined')),
    plan TEXT NOT NULL, request TEXT NOT NULL, owner TEXT NOT NULL, version INTEGER NOT NULL, restarts INTEGER NOT NULL) STRICT;
"""

# foreign keys are off while tables change (https://sqlite.org/lang_altertable.html#otheralter)
_RENAME_2 = """
DROP TABLE guest;
ALTER TABLE guest_2 RENAME TO guest;
CREATE TABLE quarantine (name TEXT PRIMARY KEY REFERENCES guest ON DELETE CASCADE, since TEXT NOT NULL,
    reasons TEXT NOT NULL) STRICT;
ALTER TABLE generation ADD COLUMN version INTEGER NOT NULL DEFAULT 1;
ALTER TABLE event ADD COLUMN who TEXT NOT NULL DEFAULT '';
ALTER TABLE event ADD COLUMN tenant TEXT NOT NULL DEFAULT '';
ALTER TABLE event ADD COLUMN took REAL;
CREATE INDEX event_of_tenant ON event (tenant, id);
CREATE INDEX undo_of_owner ON undo (owner, id);
"""

# REPLACE deletes the row that is in its way, and the trigger on DELETE is not asked (recursive_triggers is off by default). An id
# that is not given yet is -1 here, as in all versions of SQLite: https://sqlite.org/lang_createtrigger.html says "undefined".
_TRIGGER_3 = """
CREATE TRIGGER event_no_replace BEFORE INSERT ON event WHEN EXISTS (SELECT 1 FROM event WHERE id = NEW.id)
    BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""

EVENT_NO_DELETE = """
CREATE TRIGGER event_no_delete BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are append-only'); END
"""
"""As in ``_TABLES_1``: `retention` puts it back after it has removed old events."""

_COLUMN_4 = """
ALTER TABLE event ADD COLUMN trouble INTEGER NOT NULL DEFAULT 0;
CREATE INDEX event_by_age ON event (tenant, trouble, id);
"""

# One table for everything that only one guest can own: a new kind of resource needs no new table.
_KEYS_5 = """
CREATE TABLE claim_key (kind TEXT NOT NULL, key TEXT NOT NULL, guest TEXT NOT NULL REFERENCES guest ON DELETE CASCADE,
    PRIMARY KEY (kind, key)) STRICT, WITHOUT ROWID;
INSERT INTO claim_key SELECT 'cpu', CAST(cpu AS TEXT), guest FROM claim_cpu;
INSERT INTO claim_key SELECT 'vf', address, guest FROM claim_vf;
INSERT INTO claim_key SELECT 'mac', mac, guest FROM claim_mac;
CREATE INDEX claim_key_of_guest ON claim_key (guest);
DROP TABLE claim_cpu;
DROP TABLE claim_vf;
DROP TABLE claim_mac;
"""

# What schema 1 called claimed was on its way to run; its stop gave everything back.
_STATES_2 = {"claimed": "creating", "running": "running", "stopping": "deleting"}


def _migrate_1(db: sqlite3.Connection) -> None:
    _execute_all(db, _TABLES_1)


def _migrate_2(db: sqlite3.Connection) -> None:
    """Guests get more states, an owner, a version, and keep what was asked for: here the part of it that their plan tells."""
    _execute_all(db, _TABLES_2)
    for name, state, text in db.execute("SELECT name, state, plan FROM guest").fetchall():
        plan = json.loads(text)
        memory = Size(Size.parse(plan["page_size"]).bytes * plan["pages"])
        request = {"name": name, "cores": len(plan["cores"]), "memory": str(memory), "image": plan["image"]}
        values = (name, _STATES_2[state], text, json.dumps(request), "", 1, 0)
        db.execute("INSERT INTO guest_2 VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    _execute_all(db, _RENAME_2)


def _migrate_3(db: sqlite3.Connection) -> None:
    """An event can't be put in the place of another."""
    _execute_all(db, _TRIGGER_3)


def _migrate_4(db: sqlite3.Connection) -> None:
    """Events of trouble are told from others, so that they can be kept for longer. Older ones count as others."""
    _execute_all(db, _COLUMN_4)


def _migrate_5(db: sqlite3.Connection) -> None:
    """Keys of claims move into one table. A key that a damaged file has twice is an IntegrityError here."""
    _execute_all(db, _KEYS_5)


# One entry per schema version; never edit one that was released, add the next.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_migrate_1, _migrate_2, _migrate_3, _migrate_4, _migrate_5)

DAMAGED = "stop the manager and all guests, move the file away, and start again"


def check_file(path: Path, busy: float, look: Callable[[sqlite3.Connection], object]) -> None:
    """Looks whether a database is empty or a ledger that we can read.

    What is refused is not touched: neither the file nor its WAL. (-shm is made anew, and an empty -wal if there is none.)
    So whatever may refuse it looks at a copy in memory, which has been brought to our version.

    The event log is not read through: it may be large (`ledger.retention`), and the manager's start would take 3 s a GB. Damage
    in it is found when it is read or written. All else, of which claims are a part, is looked through page by page.

    Args:
        busy: how many seconds to wait for another program that holds it.
        look: raises what speaks against the copy. It has all but the events.

    Raises:
        LedgerError: it is something else, damaged, or of a newer version.
    """
    try:
        _check_through("ro", path, busy, look)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        # The power went in the moment in which the file was made, before it had a WAL: SQLite must undo that half first.
        _check_through("rw", path, busy, look)


def _check_through(mode: str, path: Path, busy: float, look: Callable[[sqlite3.Connection], object]) -> None:
    """A connection that may write moves the WAL into the file when it is closed, one that may not does not."""
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=busy, isolation_level=None)
    with contextlib.closing(db):
        _check(db, path)
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
            _copy(db, copy)
            try:
                migrate(copy)
            except (ValueError, LookupError, TypeError, RecursionError, RequestError) as error:
                what = (
                    f"the ledger {path}, of schema {read_version(db)}, holds a guest that can't be read: {type(error).__name__}"
                )
                raise LedgerError(what, DAMAGED) from None
            look(copy)


def _copy(db: sqlite3.Connection, copy: sqlite3.Connection) -> None:
    """All but the events, of which there may be too many for the memory."""
    made = "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
    for kind, name, sql in db.execute(made).fetchall():
        copy.execute(sql)
        if kind == "table" and name != "event":
            rows = db.execute(f'SELECT * FROM "{name}"')
            copy.executemany(f'INSERT INTO "{name}" VALUES ({", ".join("?" for _ in rows.description)})', rows)
    copy.execute(f"PRAGMA user_version = {read_version(db)}")


def _check(db: sqlite3.Connection, path: Path) -> None:
    version = read_version(db)
    application = _read(db, "PRAGMA application_id")
    if application != _APPLICATION and (version or db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()):
        raise LedgerError(f"{path} is a database, but no ledger", "give the manager another path")
    if version > len(MIGRATIONS):
        raise LedgerError(
            f"the ledger {path} was written by a newer version (schema {version}, this one knows {len(MIGRATIONS)})",
            "run that version, or a newer one",
        )
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name != 'event'")]
    for table in tables:
        # Of one table and its indices: SQLite 3.33 (https://sqlite.org/pragma.html#pragma_quick_check).
        found = [text for (text,) in db.execute("SELECT quick_check FROM pragma_quick_check(?)", (table,)).fetchmany(3)]
        if found != ["ok"]:
            raise LedgerError(f"the ledger {path} is damaged: {' '.join(' '.join(found).split())}", DAMAGED)


def is_current(db: sqlite3.Connection) -> bool:
    """Whether there is nothing to migrate: a start then writes nothing, and needs no space on a full disk."""
    return read_version(db) == len(MIGRATIONS) and _read(db, "PRAGMA application_id") == _APPLICATION


def migrate(db: sqlite3.Connection, version: int | None = None) -> None:
    """Brings the tables to a schema version, None for ours; within a transaction, with foreign keys off."""
    version = len(MIGRATIONS) if version is None else version
    for migration in MIGRATIONS[read_version(db) : version]:
        migration(db)
    db.execute(f"PRAGMA user_version = {version}")
    db.execute(f"PRAGMA application_id = {_APPLICATION}")


def read_version(db: sqlite3.Connection) -> int:
    """The schema version of the file; 0 for an empty one."""
    return int(_read(db, "PRAGMA user_version"))


def _read(db: sqlite3.Connection, statement: str) -> Any:
    return db.execute(statement).fetchone()[0]


def _execute_all(db: sqlite3.Connection, script: str) -> None:
    """Statement by statement: ``executescript`` would end the transaction."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
