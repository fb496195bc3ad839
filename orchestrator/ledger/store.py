"""The open ledger. The only user of sqlite3, with ``schema``.

What a method has written outlives the process when it returns. Claims and states outlive a power cut too (fsync,
https://sqlite.org/pragma.html#pragma_synchronous). Undo records need not: a power cut itself undoes what was changed on a host.
Of the event log it may take the last lines. Claims say what was promised; whether the host is so is for the audit to say.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import Conflict, LedgerError, LostRace, NotFound
from orchestrator.ledger.records import Claim, Event, Quarantined, Reading, UndoRecord
from orchestrator.ledger.schema import DAMAGED, check_file, migrate
from orchestrator.planning.plan import Plan, plan_from_json
from orchestrator.request import GuestRequest
from orchestrator.state import GuestState, check_transition

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
        # Readers have a connection of their own: with WAL they need not wait until what others write is on the disk.
        self._read_lock = threading.Lock()
        # Claims that were parsed already: name -> (version, claim).
        self._parsed: dict[str, tuple[int, Claim]] = {}
        self._listeners: list[Callable[[Event], None]] = []
        with self._explained("open"):
            _create(path)
            # isolation_level None: the sqlite3 module begins no transactions of its own.
            self._db = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
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
            self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_event(self, call: Callable[[Event], None]) -> None:
        """Has each new event told to ``call``, once it is in the file, by the thread that logged it."""
        self._listeners.append(call)

    def read(self) -> Reading:
        """All claims, by guest name, with their generation."""
        with self._reading() as db:
            versions = _rows(db, "SELECT name, version FROM guest ORDER BY name")
            claims = tuple(self._read_claim(db, name, version) for name, version in versions)
            self._parsed = {claim.plan.name: (claim.version, claim) for claim in claims}
            return Reading(int(_rows(db, "SELECT number FROM generation")[0][0]), claims)

    def find(self, name: str) -> Claim | None:
        """The claim of one guest, if it has one."""
        with self._reading() as db:
            versions = _rows(db, "SELECT version FROM guest WHERE name = ?", name)
            return self._read_claim(db, name, versions[0][0]) if versions else None

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
        with self._transaction(f"write the claim of {plan.name} to"):
            ((now, there),) = _rows(
                self._db, "SELECT number, EXISTS (SELECT 1 FROM guest WHERE name = ?) FROM generation", plan.name
            )
            if there:
                raise Conflict(f"there is a guest named {plan.name} already", "choose another name, or delete that guest first")
            if generation != now:
                changed = f"claims have changed while guest {plan.name} was planned (generation {generation}, now {now})"
                raise LostRace(changed, "try again")
            texts = json.dumps(plan.to_json()), request.model_dump_json(exclude_unset=True)
            values = (plan.name, GuestState.CREATING, *texts, owner, self._next_version(), 0)
            self._db.execute("INSERT INTO guest VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            self._take("claim_cpu", "cpu", "CPU", list(plan.cpus), plan.name)
            self._take("claim_vf", "address", "VF", [str(plan.vf.address)], plan.name)
            self._take("claim_mac", "mac", "Ethernet address", [str(plan.vf.mac)], plan.name)
            return self._next_generation()

    def release(self, name: str) -> int:
        """Takes back all that the guest owns; returns the new generation.

        Raises:
            NotFound: the guest has no claim.
            Conflict: changes made for the guest are not undone yet.
        """
        with self._transaction(f"release the claim of {name} in"):
            (left,) = _rows(self._db, "SELECT count(*) FROM undo WHERE owner = ?", name)[0]
            if left:
                raise Conflict(f"{left} changes for guest {name} are not undone yet", "others can't get its things before")
            if not self._db.execute("DELETE FROM guest WHERE name = ?", (name,)).rowcount:
                raise _no_claim(name)
            self._parsed.pop(name, None)
            return self._next_generation()

    def set_state(self, name: str, state: GuestState, *, restarts: int | None = None) -> Claim:
        """Notes how far the guest has come, and, if given, its count of restarts; returns the claim as it is now.

        Raises:
            NotFound: the guest has no claim.
            Conflict: as ``check_transition``.
        """
        with self._transaction(f"note that {name} is {state} in"):
            rows = _rows(self._db, "SELECT state, restarts FROM guest WHERE name = ?", name)
            if not rows:
                raise _no_claim(name)
            ((old, count),) = rows
            check_transition(name, GuestState(old), state)
            version = self._next_version()
            values = (state, count if restarts is None else restarts, version, name)
            self._db.execute("UPDATE guest SET state = ?, restarts = ?, version = ? WHERE name = ?", values)
            if state != GuestState.QUARANTINED:
                self._db.execute("DELETE FROM quarantine WHERE name = ?", (name,))
            return self._read_claim(self._db, name, version)

    def quarantine(self, name: str, reasons: Sequence[str]) -> None:
        """Keeps all that the guest owns from everybody, until its state is changed again.

        Raises:
            NotFound: the guest has no claim.
            Conflict: as ``check_transition``.
        """
        with self._transaction(f"put {name} into quarantine in"):
            rows = _rows(self._db, "SELECT state FROM guest WHERE name = ?", name)
            if not rows:
                raise _no_claim(name)
            check_transition(name, GuestState(rows[0][0]), GuestState.QUARANTINED)
            values = (GuestState.QUARANTINED, self._next_version(), name)
            self._db.execute("UPDATE guest SET state = ?, version = ? WHERE name = ?", values)
            self._db.execute("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?)", (name, _now(), json.dumps(list(reasons))))

    def quarantined(self) -> tuple[Quarantined, ...]:
        """All that is in quarantine, by guest name."""
        with self._reading() as db:
            rows = _rows(db, "SELECT name, since, reasons FROM quarantine ORDER BY name")
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
        with self._transaction(f"record {action} in", durable=False):
            return self._insert("undo", owner=owner, action=action, arguments=json.dumps(arguments))

    def forget(self, id: int) -> None:
        """Drops an undo record, after it was undone.

        Raises:
            NotFound: there is no such record.
        """
        with self._transaction("forget an undo record in", durable=False):
            if not self._db.execute("DELETE FROM undo WHERE id = ?", (id,)).rowcount:
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
        values = {"time": _now(), "kind": kind, "subject": subject, "detail": detail, "who": who, "tenant": tenant, "took": took}
        with self._transaction("log to", durable=False):
            event = Event(id=self._insert("event", **values), **values)  # type: ignore[arg-type]
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
            check_file(self._db, self._path)
            self._db.execute("PRAGMA journal_mode = WAL")
        with self._transaction("make"):
            migrate(self._db)
        with self._explained("open"):
            self._db.execute("PRAGMA foreign_keys = ON")

    def _next_generation(self) -> int:
        return int(_rows(self._db, "UPDATE generation SET number = number + 1 RETURNING number")[0][0])

    def _next_version(self) -> int:
        """Of all guests together, so that a new guest never has the version that was seen of an older one of its name."""
        return int(_rows(self._db, "UPDATE generation SET version = version + 1 RETURNING version")[0][0])

    def _take(self, table: str, column: str, what: str, values: Sequence[object], guest: str) -> None:
        """In two statements, however many there are: after each, the thread may have to wait for the interpreter's lock."""
        text = json.dumps(values)
        taken = _rows(self._db, f"SELECT {column} FROM {table} WHERE {column} IN (SELECT value FROM json_each(?))", text)
        if taken:
            # Not whose: that may be another tenant's.
            raise Conflict(f"{what} {taken[0][0]} can't be given to guest {guest}: it is another guest's")
        self._db.execute(f"INSERT INTO {table} SELECT value, ? FROM json_each(?)", (guest, text))

    def _read_claim(self, db: sqlite3.Connection, name: str, version: int) -> Claim:
        known = self._parsed.get(name)
        if known and known[0] == version:
            return known[1]
        ((plan, state, request, owner, restarts),) = _rows(
            db, "SELECT plan, state, request, owner, restarts FROM guest WHERE name = ?", name
        )
        try:
            asked = GuestRequest.model_validate_json(request)
            return Claim(plan_from_json(json.loads(plan)), GuestState(state), asked, owner, version, restarts)
        except ValueError as error:
            message = f"the ledger {self._path} holds a claim that can't be read: {error}"
            raise LedgerError(message, DAMAGED) from None

    def _insert(self, table: str, **values: object) -> int:
        statement = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        return int(self._db.execute(statement, tuple(values.values())).lastrowid or 0)

    @contextmanager
    def _transaction(self, what: str, *, durable: bool = True) -> Iterator[None]:
        """All or nothing. IMMEDIATE takes the write lock before anything is read, so that what was read stays true.

        Args:
            durable: on the disk when this ends. If not, a power cut may take it back, but no kill of this process can.
        """
        with self._lock, self._explained(what):
            # With WAL, NORMAL syncs nothing at a commit (https://sqlite.org/pragma.html#pragma_synchronous).
            self._db.execute("PRAGMA synchronous = FULL" if durable else "PRAGMA synchronous = NORMAL")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors (https://sqlite.org/lang_transaction.html).
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """What is read within is of one moment."""
        with self._read_lock, self._explained("read"):
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                if self._reader.in_transaction:
                    self._reader.execute("ROLLBACK")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            raise LedgerError(f"cannot {what} the ledger {self._path}: {error}", _HINTS.get(code & 0xFF, "")) from None


def _rows(db: sqlite3.Connection, statement: str, *values: object) -> Sequence[Any]:
    return db.execute(statement, values).fetchall()


def _no_claim(name: str) -> NotFound:
    return NotFound(f"there is no claim of a guest named {name}", "`nohype guest list` shows all")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _create(path: Path) -> None:
    """Makes the file readable by root alone: it tells what all guests own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise LedgerError(f"cannot open the ledger {path}: {error.strerror}", "run as root; see `mount` and `df`") from None
