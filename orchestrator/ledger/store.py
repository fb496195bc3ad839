"""The open ledger. The only user of sqlite3, with ``schema``.

What a method has written outlives the process when it returns. Claims, and the states at which a change ends, outlive a power cut
too (fsync, https://sqlite.org/pragma.html#pragma_synchronous). What is between need not: nobody was answered yet, and a power cut
ends all guests. Undo records need not: it itself undoes what was changed on a host. Of the event log it may take the last lines.
Claims say what was promised; whether the host is so is for the audit to say.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import Conflict, LedgerError, LostRace, NotFound
from orchestrator.ledger.records import Claim, Event, Quarantined, Reading, UndoRecord
from orchestrator.ledger.schema import DAMAGED, check_file, migrate
from orchestrator.planning.plan import Plan, plan_from_json
from orchestrator.request import GuestRequest
from orchestrator.service.watchdog import WatchedLock
from orchestrator.state import SETTLED, GuestState, check_transition

_BUSY = 10.0

_HINTS = {
    sqlite3.SQLITE_FULL: "free some space on its disk, then try again",
    sqlite3.SQLITE_READONLY: "its disk or folder can't be written: run as root; see `mount` and `lsattr`",
    sqlite3.SQLITE_CANTOPEN: "its folder can't be written or the path is wrong: run as root",
    sqlite3.SQLITE_BUSY: "another program holds it; only one manager may run on a host",
    sqlite3.SQLITE_IOERR: "the disk reports errors, or is full: see `dmesg` and `df`",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: "it is another kind of file: give the manager another path",
}


@dataclass
class _Known:
    """The claims and the two counters in the file.

    Attributes:
        generation: grows with each claim.
        version: of the guest that was changed last. Of all guests together, so that a new guest never has the version that was
            seen of an older one of its name.
        claims: by guest name, in its order.
    """

    generation: int
    version: int
    claims: dict[str, Claim]

    def get(self, name: str) -> Claim:
        """The claim of a guest that has one.

        Raises:
            NotFound: it has none.
        """
        if name not in self.claims:
            raise NotFound(f"there is no claim of a guest named {name}", "`nohype guest list` shows all")
        return self.claims[name]


class Ledger:
    """An open ledger, for several threads. A method that raises LedgerError (file can't be read or written) changed nothing.

    Args:
        path: the database; it and its folder are made if they are not there.

    Raises:
        LedgerError: the file is damaged, no ledger, of a newer version, or can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = WatchedLock()
        # Readers have a connection of their own: with WAL they need not wait until what others write is on the disk.
        self._read_lock = threading.Lock()
        self._listeners: list[Callable[[Event], None]] = []
        with self._explained("open"):
            _create(path)
            check_file(path, _BUSY)
            # isolation_level None: the sqlite3 module begins no transactions of its own.
            self._db = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
            self._unsynced = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
            self._reader = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file. The ledger can't be used afterwards."""
        with self._read_lock, self._lock:
            self._reader.close()
            self._unsynced.close()
            self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_event(self, call: Callable[[Event], None]) -> None:
        """Has each new event told to ``call``, once it is in the file, by the thread that logged it."""
        self._listeners.append(call)

    def check(self, limit: float) -> None:
        """Looks whether the file can be read, and whether writing it goes on.

        Raises:
            LedgerError: it can't be read.
            OrchestratorError: one write has taken more than ``limit`` seconds.
        """
        self._lock.check(limit)
        self.last_event()

    def read(self) -> Reading:
        """All claims, by guest name, with their generation."""
        known = self._known  # once: others replace it
        return Reading(known.generation, tuple(known.claims.values()))

    def find(self, name: str) -> Claim | None:
        """The claim of one guest, if it has one."""
        return self._known.claims.get(name)

    def claim(self, plan: Plan, generation: int, request: GuestRequest, owner: str = "") -> int:
        """Gives the guest all that the plan names, or nothing. Its state is CREATING then.

        Args:
            generation: from the ``read`` on which the plan is based.
            request: what was asked for.
            owner: the tenant, empty for the host's own.

        Returns:
            The new generation.

        Raises:
            LostRace: claims have changed since; read again, plan again.
            Conflict: the name is taken, or a CPU, VF or MAC address is another guest's.
        """
        name, texts = plan.name, (json.dumps(plan.to_json()), request.model_dump_json(exclude_unset=True))
        with self._changing(f"write the claim of {name} to") as now, self._transaction():
            if name in now.claims:
                raise Conflict(f"there is a guest named {name} already", "choose another name, or delete that guest first")
            statement = "UPDATE generation SET number = ?1 + 1, version = max(version, ?2) WHERE number = ?1"
            if not self._db.execute(statement, (generation, now.version)).rowcount:
                raise LostRace(f"claims have changed while guest {name} was planned (generation {generation})", "try again")
            values = (name, GuestState.CREATING, *texts, owner, now.version, 0)
            self._db.execute("INSERT INTO guest VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            self._take("claim_cpu", "cpu", "CPU", list(plan.cpus), name)
            self._take("claim_vf", "address", "VF", [str(plan.vf.address)], name)
            self._take("claim_mac", "mac", "Ethernet address", [str(plan.vf.mac)], name)
            claim = Claim(plan, GuestState.CREATING, request, owner, now.version)
            now.generation, now.claims = generation + 1, dict(sorted({**now.claims, name: claim}.items()))
        return now.generation

    def release(self, name: str) -> None:
        """Takes back all that the guest owns. The generation stays: what was planned before can be claimed all the same.

        Raises:
            NotFound: the guest has no claim.
            Conflict: changes made for the guest are not undone yet.
        """
        with self._changing(f"release the claim of {name} in") as now, self._transaction():
            (left,) = _rows(self._db, "SELECT count(*) FROM undo WHERE owner = ?", name)[0]
            if left:
                raise Conflict(f"{left} changes for guest {name} are not undone yet", "others can't get its things before")
            values = (name, now.get(name).version)
            _check_found(self._db.execute("DELETE FROM guest WHERE name = ? AND version = ?", values), name)
            self._db.execute("UPDATE generation SET version = max(version, ?)", (now.version,))
            del now.claims[name]

    def set_state(self, name: str, state: GuestState, *, restarts: int | None = None) -> Claim:
        """Notes how far the guest has come, and, if given, its count of restarts; returns the claim as it is now.

        A power cut may take back a state that is on the way to another (not one of ``SETTLED``).

        Raises:
            NotFound: the guest has no claim.
            Conflict: as ``check_transition``.
        """
        with self._changing(f"note that {name} is {state} in") as now:
            self._set_state(now, name, state, restarts)
        return now.claims[name]

    def quarantine(self, name: str, reasons: Sequence[str]) -> None:
        """Keeps all that the guest owns from everybody, until its state is changed again.

        Raises:
            NotFound: the guest has no claim.
            Conflict: as ``check_transition``.
        """
        with self._changing(f"put {name} into quarantine in") as now, self._transaction():
            self._set_state(now, name, GuestState.QUARANTINED)
            self._db.execute("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?)", (name, _now(), json.dumps(list(reasons))))

    def quarantined(self) -> tuple[Quarantined, ...]:
        """All that is in quarantine, by guest name."""
        with self._reading() as db:
            # The reasons stay when the state is changed again, until there are new ones.
            tables = "quarantine JOIN guest USING (name) WHERE state = 'quarantined'"
            rows = _rows(db, f"SELECT name, since, reasons FROM {tables} ORDER BY name")
            return tuple(Quarantined(name, since, tuple(json.loads(reasons))) for name, since, reasons in rows)

    def record(self, owner: str, action: str, arguments: dict[str, object]) -> int:
        """Writes how to undo a change; to be called *before* the change. Undoing what was never done must do no harm.

        Args:
            owner: name of the guest the change is for, or "host".
            action: names the function that undoes it.
            arguments: what that function needs, plain JSON types.

        Returns:
            The record's id, for ``forget``.
        """
        # In the file before the change, so no kill loses it; a power cut undoes the change by itself.
        statement = "INSERT INTO undo (owner, action, arguments) VALUES (?, ?, ?)"
        return int(self._write(f"record {action} in", statement, owner, action, json.dumps(arguments)).lastrowid or 0)

    def forget(self, id: int) -> None:
        """Drops an undo record, after it was undone.

        Raises:
            NotFound: there is no such record.
        """
        if not self._write("forget an undo record in", "DELETE FROM undo WHERE id = ?", id).rowcount:
            raise NotFound(f"there is no undo record {id}")

    def pending(self, owner: str) -> tuple[UndoRecord, ...]:
        """What is still to be undone for the owner, newest first."""
        with self._reading() as db:
            rows = _rows(db, "SELECT id, owner, action, arguments FROM undo WHERE owner = ? ORDER BY id DESC", owner)
            return tuple(UndoRecord(id, owner, action, json.loads(text)) for id, owner, action, text in rows)

    def log(
        self, kind: str, subject: str, detail: str, *, who: str = "manager", tenant: str = "", took: float | None = None
    ) -> Event:
        """Adds an event, which is never changed or removed; the arguments are an Event's."""
        values = (_now(), kind, subject, detail, who, tenant, took)
        statement = "INSERT INTO event (time, kind, subject, detail, who, tenant, took) VALUES (?, ?, ?, ?, ?, ?, ?)"
        event = Event(int(self._write("log to", statement, *values).lastrowid or 0), *values)
        for call in self._listeners:
            call(event)
        return event

    def events(self, after: int | None = 0, limit: int = 1000, tenant: str | None = None) -> tuple[Event, ...]:
        """Up to ``limit`` events of all tenants or of one, oldest first: the first with ids above ``after``, or, if that is None,
        the newest.
        """
        where, values = ("tenant = ? AND id > ?", [tenant]) if tenant is not None else ("id > ?", [])
        order = "DESC" if after is None else "ASC"
        columns = "id, time, kind, subject, detail, who, tenant, took"
        with self._reading() as db:
            statement = f"SELECT {columns} FROM event WHERE {where} ORDER BY id {order} LIMIT ?"
            rows = [Event(*row) for row in _rows(db, statement, *values, after or 0, limit)]
            return tuple(rows[::-1] if after is None else rows)

    def last_event(self) -> int:
        """The id of the newest event; 0 if there is none."""
        with self._reading() as db:
            return int(_rows(db, "SELECT coalesce(max(id), 0) FROM event")[0][0])

    def _prepare(self) -> None:
        with self._explained("open"):
            self._db.execute("PRAGMA journal_mode = WAL")
        with self._explained("make"), self._transaction():
            migrate(self._db)
        with self._explained("open"):
            self._db.execute("PRAGMA foreign_keys = ON")
            # With WAL, NORMAL syncs nothing at a commit (https://sqlite.org/pragma.html#pragma_synchronous).
            self._db.execute("PRAGMA synchronous = FULL")
            self._unsynced.execute("PRAGMA synchronous = NORMAL")
            self._known = self._load()

    def _load(self) -> _Known:
        """What the file holds."""
        ((generation, version),) = _rows(self._db, "SELECT number, version FROM generation")
        rows = _rows(self._db, "SELECT name, plan, state, request, owner, version, restarts FROM guest ORDER BY name")
        try:
            claims = {name: _parse_claim(*fields) for name, *fields in rows}
        except ValueError as error:
            message = f"the ledger {self._path} holds a claim that can't be read: {error}"
            raise LedgerError(message, DAMAGED) from None
        return _Known(generation, max((version, *(claim.version for claim in claims.values()))), claims)

    def _set_state(self, now: _Known, name: str, state: GuestState, restarts: int | None = None) -> None:
        before = now.get(name)
        check_transition(name, before.state, state)
        count = before.restarts if restarts is None else restarts
        after = replace(before, state=state, restarts=count, version=now.version, previous=before.version)
        statement = "UPDATE guest SET state = ?, restarts = ?, version = ? WHERE name = ? AND version = ?"
        values = (after.state, after.restarts, after.version, name, before.version)
        _check_found((self._db if state in SETTLED else self._unsynced).execute(statement, values), name)
        now.claims[name] = after

    def _take(self, table: str, column: str, what: str, values: Sequence[object], guest: str) -> None:
        """In one statement, however many there are: after each, the thread may have to wait for the interpreter's lock."""
        text = json.dumps(values)
        try:
            self._db.execute(f"INSERT INTO {table} SELECT value, ? FROM json_each(?)", (guest, text))
        except sqlite3.IntegrityError:
            taken = _rows(self._db, f"SELECT {column} FROM {table} WHERE {column} IN (SELECT value FROM json_each(?))", text)
            if not taken:
                raise
            # Not whose: that may be another tenant's.
            raise Conflict(f"{what} {taken[0][0]} can't be given to guest {guest}: it is another guest's") from None

    @contextmanager
    def _changing(self, what: str) -> Iterator[_Known]:
        """A change of claims, by one statement or by one transaction; on the disk when this ends, or not done at all.

        Yields:
            What is known afterwards, to be changed as the file is.

        Raises:
            LostRace: another program has changed the file; what it holds is known now.
        """
        with self._lock, self._explained(what):
            before = self._known
            now = _Known(before.generation, before.version + 1, dict(before.claims))
            try:
                yield now
            except LostRace:
                self._known = self._load()
                raise
            self._known = now

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and on the disk. IMMEDIATE takes the write lock before anything is read, so that it stays true."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors (https://sqlite.org/lang_transaction.html).
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _write(self, what: str, statement: str, *values: object) -> sqlite3.Cursor:
        """One statement, which is a transaction of its own: a power cut may take it back, but no kill of this process can."""
        with self._lock, self._explained(what):
            return self._unsynced.execute(statement, values)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock, self._explained("read"):
            yield self._reader

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            raise LedgerError(f"cannot {what} the ledger {self._path}: {error}", _HINTS.get(code & 0xFF, "")) from None


def _rows(db: sqlite3.Connection, statement: str, *values: object) -> Sequence[Any]:
    return db.execute(statement, values).fetchall()


def _parse_claim(plan: str, state: str, request: str, owner: str, version: int, restarts: int) -> Claim:
    asked = GuestRequest.model_validate_json(request)
    return Claim(plan_from_json(json.loads(plan)), GuestState(state), asked, owner, version, restarts)


def _check_found(cursor: sqlite3.Cursor, name: str) -> None:
    if not cursor.rowcount:
        raise LostRace(f"guest {name} was changed by another program", "try again")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _create(path: Path) -> None:
    """Makes the file readable by root alone: it tells what all guests own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise LedgerError(f"cannot open the ledger {path}: {error.strerror}", "run as root; see `mount` and `df`") from None
