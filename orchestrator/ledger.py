"""What guests own, the undo journal and the event log: one SQLite file. The only user of sqlite3.

Everything is on disk (fsync, https://sqlite.org/pragma.html#pragma_synchronous) when a method returns. Claims say what was
promised; whether the host is so is for the audit to say.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.errors import Conflict, LedgerError, LostRace, NotFound
from orchestrator.plan import Plan, plan_from_json

_APPLICATION = 0x4E48
_BUSY = 10.0

# One entry a schema version; never edit one that was released, add the next.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE generation (id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL) STRICT",
        "INSERT INTO generation VALUES (1, 0)",
        "CREATE TABLE guest (name TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('claimed', 'running', 'stopping')),"
        " plan TEXT NOT NULL) STRICT",
        # Primary keys, so that no bug elsewhere can promise one thing to two guests.
        "CREATE TABLE claim_cpu (cpu INTEGER PRIMARY KEY, guest TEXT NOT NULL REFERENCES guest ON DELETE CASCADE) STRICT",
        "CREATE TABLE claim_vf (address TEXT PRIMARY KEY, guest TEXT NOT NULL REFERENCES guest ON DELETE CASCADE) STRICT",
        "CREATE TABLE claim_mac (mac TEXT PRIMARY KEY, guest TEXT NOT NULL REFERENCES guest ON DELETE CASCADE) STRICT",
        # AUTOINCREMENT: an id is never used again, so that a stale one forgets nothing.
        "CREATE TABLE undo (id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, action TEXT NOT NULL,"
        " arguments TEXT NOT NULL) STRICT",
        "CREATE TABLE event (id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL,"
        " detail TEXT NOT NULL) STRICT",
        "CREATE TRIGGER event_no_update BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are append-only'); END",
        "CREATE TRIGGER event_no_delete BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are append-only'); END",
    ),
)

_HINTS = {
    sqlite3.SQLITE_FULL: "free some space on its disk, then try again",
    sqlite3.SQLITE_READONLY: "its disk or folder can't be written: run as root; see `mount` and `lsattr`",
    sqlite3.SQLITE_CANTOPEN: "its folder can't be written or the path is wrong: run as root",
    sqlite3.SQLITE_BUSY: "another program holds it; only one manager may run on a host",
    sqlite3.SQLITE_IOERR: "the disk reports errors, or is full: see `dmesg` and `df`",
    sqlite3.SQLITE_CORRUPT: "stop the manager and all guests, move the file away, and start again",
    sqlite3.SQLITE_NOTADB: "it is another kind of file: give the manager another path",
}


class GuestState(StrEnum):
    """How far a guest that holds a claim has come."""

    CLAIMED = "claimed"
    RUNNING = "running"
    STOPPING = "stopping"


# STOPPING to itself: a stop that failed half-way is tried again.
_NEXT = {
    GuestState.CLAIMED: (GuestState.RUNNING, GuestState.STOPPING),
    GuestState.RUNNING: (GuestState.STOPPING,),
    GuestState.STOPPING: (GuestState.STOPPING,),
}


def check_transition(name: str, old: GuestState, new: GuestState) -> None:
    """Refuses a change of state that has no meaning.

    Raises:
        Conflict: with both states.
    """
    if new not in _NEXT[old]:
        raise Conflict(f"guest {name} is {old} and can't become {new}", f"from {old} it can become {' or '.join(_NEXT[old])}")


@dataclass(frozen=True)
class Claim:
    """A guest's claim and how far the guest has come."""

    plan: Plan
    state: GuestState


@dataclass(frozen=True)
class Reading:
    """All claims at one moment; ``generation`` changes with each claim and each release."""

    generation: int
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class UndoRecord:
    """How to undo one change to the host. ``owner`` is a guest's name or "host"."""

    id: int
    owner: str
    action: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class Event:
    """Something that happened; ``time`` is UTC in ISO 8601."""

    id: int
    time: str
    kind: str
    subject: str
    detail: str


class Ledger:
    """An open ledger, for several threads. A method that raises LedgerError (file can't be read or written) changed nothing.

    Args:
        path: the database; it and its folder are made if they are not there.

    Raises:
        LedgerError: the file is damaged, no ledger, of a newer version, or can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        with self._explained("open"):
            _create(path)
            # isolation_level None: the sqlite3 module begins no transactions of its own.
            self._db = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the file. The ledger can't be used afterwards."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> Reading:
        """All claims, by guest name, with their generation."""
        with self._transaction("read", "BEGIN"):
            rows = self._all("SELECT plan, state FROM guest ORDER BY name")
            return Reading(self._generation(), tuple(self._claim(*row) for row in rows))

    def claim(self, plan: Plan, generation: int) -> int:
        """Gives the guest all that the plan names, or nothing.

        Args:
            generation: from the ``read`` on which the plan is based.

        Returns:
            The new generation.

        Raises:
            LostRace: claims have changed since; read again, plan again.
            Conflict: the name is taken, or a CPU, VF or MAC address is another guest's.
        """
        with self._transaction(f"write the claim of {plan.name} to"):
            if self._all("SELECT 1 FROM guest WHERE name = ?", plan.name):
                raise Conflict(f"there is a guest named {plan.name} already", "choose another name, or stop that guest first")
            if generation != (now := self._generation()):
                changed = f"claims have changed while guest {plan.name} was planned (generation {generation}, now {now})"
                raise LostRace(changed, "try again")
            self._db.execute("INSERT INTO guest VALUES (?, ?, ?)", (plan.name, GuestState.CLAIMED, json.dumps(plan.to_json())))
            for cpu in plan.cpus:
                self._take("claim_cpu", "cpu", "CPU", cpu, plan.name)
            self._take("claim_vf", "address", "VF", str(plan.vf.address), plan.name)
            self._take("claim_mac", "mac", "Ethernet address", str(plan.vf.mac), plan.name)
            return self._next_generation()

    def release(self, name: str) -> int:
        """Takes back all that the guest owns; returns the new generation.

        Raises:
            NotFound: the guest has no claim.
            Conflict: changes made for the guest are not undone yet.
        """
        with self._transaction(f"release the claim of {name} in"):
            (left,) = self._all("SELECT count(*) FROM undo WHERE owner = ?", name)[0]
            if left:
                raise Conflict(f"{left} changes for guest {name} are not undone yet", "others can't get its things before")
            if not self._db.execute("DELETE FROM guest WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"there is no claim of a guest named {name}", "`nohype guest list` shows all")
            return self._next_generation()

    def set_state(self, name: str, state: GuestState) -> None:
        """Notes how far the guest has come. Raises NotFound without a claim, and as ``check_transition`` does."""
        with self._transaction(f"note that {name} is {state} in"):
            rows = self._all("SELECT state FROM guest WHERE name = ?", name)
            if not rows:
                raise NotFound(f"there is no claim of a guest named {name}", "`nohype guest list` shows all")
            check_transition(name, GuestState(rows[0][0]), state)
            self._db.execute("UPDATE guest SET state = ? WHERE name = ?", (state, name))

    def record(self, owner: str, action: str, arguments: dict[str, object]) -> int:
        """Writes how to undo a change; to be called *before* the change. Undoing what was never done must do no harm.

        Args:
            owner: name of the guest the change is for, or "host".
            action: names the function that undoes it.
            arguments: what that function needs, plain JSON types.

        Returns:
            The record's id, for ``forget``.
        """
        with self._transaction(f"record {action} in"):
            return self._insert("undo", owner=owner, action=action, arguments=json.dumps(arguments))

    def forget(self, id: int) -> None:
        """Drops an undo record, after it was undone.

        Raises:
            NotFound: there is no such record.
        """
        with self._transaction("forget an undo record in"):
            if not self._db.execute("DELETE FROM undo WHERE id = ?", (id,)).rowcount:
                raise NotFound(f"there is no undo record {id}")

    def pending(self, owner: str) -> tuple[UndoRecord, ...]:
        """What is still to be undone for the owner, newest first."""
        with self._transaction("read", "BEGIN"):
            rows = self._all("SELECT id, owner, action, arguments FROM undo WHERE owner = ? ORDER BY id DESC", owner)
            return tuple(UndoRecord(id, owner, action, json.loads(text)) for id, owner, action, text in rows)

    def log(self, kind: str, subject: str, detail: str) -> int:
        """Adds an event, which is never changed or removed; returns its id.

        Args:
            kind: what sort of thing happened, such as "guest-started".
            subject: a guest's name or "host".
        """
        with self._transaction("log to"):
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            return self._insert("event", time=time, kind=kind, subject=subject, detail=detail)

    def events(self, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """Up to ``limit`` events with ids above ``after``, oldest first."""
        with self._transaction("read", "BEGIN"):
            rows = self._all("SELECT id, time, kind, subject, detail FROM event WHERE id > ? ORDER BY id LIMIT ?", after, limit)
            return tuple(Event(*row) for row in rows)

    def _prepare(self) -> None:
        with self._explained("open"):
            self._check_file()
            self._db.execute("PRAGMA journal_mode = WAL")
            # FULL, not NORMAL: with WAL, NORMAL may lose the last commits when the power fails.
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction("make"):
            for statements in _MIGRATIONS[self._version() :]:
                for statement in statements:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
            self._db.execute(f"PRAGMA application_id = {_APPLICATION}")

    def _check_file(self) -> None:
        """Nothing is written before the file is known to be ours."""
        version = self._version()
        ((application,),) = self._all("PRAGMA application_id")
        if application != _APPLICATION and (version or self._all("SELECT 1 FROM sqlite_schema LIMIT 1")):
            raise LedgerError(f"{self._path} is a database, but no ledger", "give the manager another path")
        if version > len(_MIGRATIONS):
            raise LedgerError(
                f"the ledger {self._path} was written by a newer version (schema {version}, this one knows {len(_MIGRATIONS)})",
                "run that version, or a newer one",
            )
        findings = " ".join(" ".join(row) for row in self._all("PRAGMA quick_check(3)")).split()
        if findings != ["ok"]:
            raise LedgerError(f"the ledger {self._path} is damaged: {' '.join(findings)}", _HINTS[sqlite3.SQLITE_CORRUPT])

    def _version(self) -> int:
        ((version,),) = self._all("PRAGMA user_version")
        return int(version)

    def _generation(self) -> int:
        ((number,),) = self._all("SELECT number FROM generation")
        return int(number)

    def _next_generation(self) -> int:
        self._db.execute("UPDATE generation SET number = number + 1")
        return self._generation()

    def _take(self, table: str, column: str, what: str, value: object, guest: str) -> None:
        owner = self._all(f"SELECT guest FROM {table} WHERE {column} = ?", value)
        if owner:
            raise Conflict(f"{what} {value} can't be given to guest {guest}: it is guest {owner[0][0]}'s")
        self._db.execute(f"INSERT INTO {table} VALUES (?, ?)", (value, guest))

    def _claim(self, plan: str, state: str) -> Claim:
        try:
            return Claim(plan_from_json(json.loads(plan)), GuestState(state))
        except ValueError as error:
            message = f"the ledger {self._path} holds a claim that can't be read: {error}"
            raise LedgerError(message, _HINTS[sqlite3.SQLITE_CORRUPT]) from None

    def _insert(self, table: str, **values: str) -> int:
        statement = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        return int(self._db.execute(statement, tuple(values.values())).lastrowid or 0)

    def _all(self, statement: str, *values: object) -> Sequence[Any]:
        return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self, what: str, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        """All or nothing. IMMEDIATE takes the write lock before anything is read, so that what was read stays true."""
        with self._lock, self._explained(what):
            self._db.execute(begin)
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors (https://sqlite.org/lang_transaction.html).
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            raise LedgerError(f"cannot {what} the ledger {self._path}: {error}", _HINTS.get(code & 0xFF, "")) from None


def _create(path: Path) -> None:
    """Makes the file readable by root alone: it tells what all guests own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise LedgerError(f"cannot open the ledger {path}: {error.strerror}", "run as root; see `mount` and `df`") from None
