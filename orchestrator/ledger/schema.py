"""The ledger's tables and their migrations. A file that is not a ledger is never written."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import LedgerError, RequestError
from orchestrator.ledger.chain import link_all
from orchestrator.values import Size

_APPLICATION = 0x4E48

# The primary keys of claim_* refuse to allocate a resource twice, even if other code has a bug.
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

# REPLACE deletes the conflicting row without firing the DELETE trigger (recursive_triggers is off by default). An id
# that is not assigned yet is -1 here, as in all versions of SQLite: https://sqlite.org/lang_createtrigger.html says "undefined".
_TRIGGER_3 = """
CREATE TRIGGER event_no_replace BEFORE INSERT ON event WHEN EXISTS (SELECT 1 FROM event WHERE id = NEW.id)
    BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""

EVENT_NO_DELETE = """
CREATE TRIGGER event_no_delete BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are append-only'); END
"""
"""As in ``_TABLES_1``: `retention` creates it again after it has removed old events."""

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

_HOST_KEY_6 = """
CREATE TABLE host_key (guest TEXT PRIMARY KEY REFERENCES guest ON DELETE CASCADE, key TEXT NOT NULL) STRICT;
"""

_WIPING_7 = """
CREATE TABLE guest_7 (name TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN
    ('creating', 'starting', 'running', 'stopping', 'stopped', 'deleting', 'wiping', 'quarantined')),
    plan TEXT NOT NULL, request TEXT NOT NULL, owner TEXT NOT NULL, version INTEGER NOT NULL, restarts INTEGER NOT NULL) STRICT;
INSERT INTO guest_7 SELECT name, state, plan, request, owner, version, restarts FROM guest;
DROP TABLE guest;
ALTER TABLE guest_7 RENAME TO guest;
CREATE TABLE disk_check (guest TEXT NOT NULL REFERENCES guest ON DELETE CASCADE, disk TEXT NOT NULL, record TEXT NOT NULL,
    PRIMARY KEY (guest, disk)) STRICT;
"""

_SWITCH_8 = """
CREATE TABLE switch (name TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
"""

_NETWORK_9 = """
CREATE TABLE network (name TEXT PRIMARY KEY, vlan INTEGER NOT NULL UNIQUE, owner TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""

_UPLINK_10 = """
CREATE TABLE uplink_edge (uplink TEXT PRIMARY KEY, edge TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""

_DISENGAGEMENT_11 = """
CREATE TABLE disengagement (guest TEXT PRIMARY KEY REFERENCES guest ON DELETE CASCADE, record TEXT NOT NULL) STRICT;
"""

_CHAIN_12 = """
ALTER TABLE event ADD COLUMN removed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE event ADD COLUMN hash TEXT NOT NULL DEFAULT '';
CREATE TABLE event_gap (first INTEGER PRIMARY KEY, last INTEGER NOT NULL UNIQUE, hash TEXT NOT NULL) STRICT;
DROP TRIGGER event_no_update;
"""

_NO_UPDATE_12 = """
CREATE TRIGGER event_no_update BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""

_CORE_START_13 = """
CREATE TABLE core_start (guest TEXT PRIMARY KEY REFERENCES guest ON DELETE CASCADE, record TEXT NOT NULL) STRICT;
"""

_CREATED_14 = """
ALTER TABLE guest ADD COLUMN created TEXT NOT NULL DEFAULT '';
ALTER TABLE guest ADD COLUMN creator TEXT NOT NULL DEFAULT '';
"""

# In schema 1 a claimed guest was being started, and a stop released the claim.
_STATES_2 = {"claimed": "creating", "running": "running", "stopping": "deleting"}


def _migrate_1(db: sqlite3.Connection) -> None:
    _execute_all(db, _TABLES_1)


def _migrate_2(db: sqlite3.Connection) -> None:
    """Adds states, owner, version and request. Requests of older guests are derived from their plans."""
    _execute_all(db, _TABLES_2)
    for name, state, text in db.execute("SELECT name, state, plan FROM guest").fetchall():
        plan = json.loads(text)
        memory = Size(Size.parse(plan["page_size"]).bytes * plan["pages"])
        request = {"name": name, "cores": len(plan["cores"]), "memory": str(memory), "image": plan["image"]}
        values = (name, _STATES_2[state], text, json.dumps(request), "", 1, 0)
        db.execute("INSERT INTO guest_2 VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    _execute_all(db, _RENAME_2)


def _migrate_3(db: sqlite3.Connection) -> None:
    """Events cannot be replaced."""
    _execute_all(db, _TRIGGER_3)


def _migrate_4(db: sqlite3.Connection) -> None:
    """Marks trouble events, which are kept longer. Older events count as ordinary."""
    _execute_all(db, _COLUMN_4)


def _migrate_5(db: sqlite3.Connection) -> None:
    """Moves keys of claims into one table. A key that a damaged file has twice is an IntegrityError."""
    _execute_all(db, _KEYS_5)


def _migrate_6(db: sqlite3.Connection) -> None:
    """Adds the SSH host keys that guests have reported."""
    _execute_all(db, _HOST_KEY_6)


def _migrate_7(db: sqlite3.Connection) -> None:
    """Adds the state wiping, and how disks were verified."""
    _execute_all(db, _WIPING_7)


def _migrate_8(db: sqlite3.Connection) -> None:
    """Adds the external switches."""
    _execute_all(db, _SWITCH_8)


def _migrate_9(db: sqlite3.Connection) -> None:
    """Adds the tenant networks."""
    _execute_all(db, _NETWORK_9)


def _migrate_10(db: sqlite3.Connection) -> None:
    """Adds the edge modes of uplinks that differ from the configuration."""
    _execute_all(db, _UPLINK_10)


def _migrate_11(db: sqlite3.Connection) -> None:
    """Adds the ends of guests' boots."""
    _execute_all(db, _DISENGAGEMENT_11)


def _migrate_12(db: sqlite3.Connection) -> None:
    """Links the events by their hashes."""
    _execute_all(db, _CHAIN_12)
    link_all(db)
    _execute_all(db, _NO_UPDATE_12)


def _migrate_13(db: sqlite3.Connection) -> None:
    """Adds the counters of guests' cores at their starts."""
    _execute_all(db, _CORE_START_13)


def _migrate_14(db: sqlite3.Connection) -> None:
    """Adds when and by whom each guest was created; of older guests as the event log has it, if it does."""
    _execute_all(db, _CREATED_14)
    events = "SELECT time, who, subject, max(id) FROM event WHERE kind = 'claimed' GROUP BY subject"
    db.execute(f"UPDATE guest SET created = time, creator = who FROM ({events}) WHERE subject = name")


# One entry per schema version. Never edit a released migration: add the next one.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _migrate_1, _migrate_2, _migrate_3, _migrate_4, _migrate_5, _migrate_6, _migrate_7, _migrate_8, _migrate_9,
    _migrate_10, _migrate_11, _migrate_12, _migrate_13, _migrate_14,
)  # fmt: skip

DAMAGED = "stop the manager and all guests, move the file away, and start again"


def check_file(path: Path, busy: float, accept: Callable[[sqlite3.Connection], object]) -> None:
    """Checks that a database is empty or a readable ledger, and calls ``accept`` with a migrated copy, without events.

    A refused file is not touched, nor is its WAL. (-shm is rebuilt, and an empty -wal if there is none.)

    The event log is not verified: it may be large (`ledger.retention`), and 1 GB would delay the start by 3 s. Its damage is
    found at the next access. All other pages are verified.

    Args:
        busy: seconds to wait for another program that holds the file.
        accept: raises to refuse the copy.

    Raises:
        LedgerError: the file is not a ledger, damaged, or of a newer version.
    """
    try:
        _check_through("ro", path, busy, accept)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        # A power cut during the creation, before the file had a WAL: SQLite must roll it back first.
        _check_through("rw", path, busy, accept)


def _check_through(mode: str, path: Path, busy: float, accept: Callable[[sqlite3.Connection], object]) -> None:
    """A connection that may write moves the WAL into the file when it is closed; a read-only one does not."""
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=busy, isolation_level=None)
    with contextlib.closing(db):
        db.execute("BEGIN")  # one snapshot: a manager may be writing
        _check(db, path)
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
            _copy(db, copy)
            try:
                migrate(copy)
            except (ValueError, LookupError, TypeError, RecursionError, RequestError) as error:
                message = f"cannot migrate the ledger {path} from schema {read_version(db)}: {type(error).__name__}"
                raise LedgerError(message, DAMAGED) from None
            accept(copy)


def _copy(db: sqlite3.Connection, copy: sqlite3.Connection) -> None:
    """All tables except the events, which may not fit into memory."""
    objects = "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
    for kind, name, sql in db.execute(objects).fetchall():
        copy.execute(sql)
        if kind == "table" and name != "event":
            rows = db.execute(f'SELECT * FROM "{name}"')
            copy.executemany(f'INSERT INTO "{name}" VALUES ({", ".join("?" for _ in rows.description)})', rows)
    copy.execute(f"PRAGMA user_version = {read_version(db)}")


def _check(db: sqlite3.Connection, path: Path) -> None:
    version = read_version(db)
    application = _read(db, "PRAGMA application_id")
    if application != _APPLICATION and (version or db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()):
        raise LedgerError(f"{path} is a database, but not a ledger", "give the manager another path")
    if version > len(MIGRATIONS):
        raise LedgerError(
            f"the ledger {path} was written by a newer version (schema {version}, this one knows {len(MIGRATIONS)})",
            "run that version, or a newer one",
        )
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name != 'event'")]
    for table in tables:
        # Checks one table and its indices: SQLite 3.33 (https://sqlite.org/pragma.html#pragma_quick_check).
        findings = [text for (text,) in db.execute("SELECT quick_check FROM pragma_quick_check(?)", (table,)).fetchmany(3)]
        if findings != ["ok"]:
            raise LedgerError(f"the ledger {path} is damaged: {' '.join(' '.join(findings).split())}", DAMAGED)


def is_current(db: sqlite3.Connection) -> bool:
    """No migration needed: the start writes nothing, and needs no space on a full disk."""
    return read_version(db) == len(MIGRATIONS) and _read(db, "PRAGMA application_id") == _APPLICATION


def migrate(db: sqlite3.Connection, version: int | None = None) -> None:
    """Migrates to a schema version, None for the current one; within a transaction, with foreign keys off."""
    version = len(MIGRATIONS) if version is None else version
    for migration in MIGRATIONS[read_version(db) : version]:
        migration(db)
    db.execute(f"PRAGMA user_version = {version}")
    db.execute(f"PRAGMA application_id = {_APPLICATION}")


def read_version(db: sqlite3.Connection) -> int:
    """0 for an empty file."""
    return int(_read(db, "PRAGMA user_version"))


def _read(db: sqlite3.Connection, statement: str) -> Any:
    return db.execute(statement).fetchone()[0]


def _execute_all(db: sqlite3.Connection, script: str) -> None:
    """One statement at a time: ``executescript`` would end the transaction."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
