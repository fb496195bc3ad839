"""The open ledger: what may be written to it, and what is read.

What a method has written outlives the process when it returns. Claims, and the states at which a change ends, outlive a power cut
too (fsync, https://sqlite.org/pragma.html#pragma_synchronous). What is between need not: nobody was answered yet, and a power cut
ends all guests. Undo records need not: it itself undoes what was changed on a host. Of the event log it may take the last lines.
Claims say what was promised; whether the host is so is for the audit to say.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.errors import Conflict, LostRace, NotFound
from orchestrator.ledger.database import Accept, Database
from orchestrator.ledger.loading import Known, parse_arguments, parse_reasons, read_rows
from orchestrator.ledger.retention import KEEP, LONGEST, Retention
from orchestrator.model.claim import Claim, Quarantined, Reading, UndoRecord
from orchestrator.model.event import EVENT_FIELDS, Event, EventKind, Visibility
from orchestrator.model.plain import to_plain
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import SETTLED, GuestState, check_transition

_log = logging.getLogger(__name__)

_COLUMNS = ", ".join(EVENT_FIELDS)
_WRITTEN = EVENT_FIELDS[1:]  # SQLite chooses the id
_INSERT_EVENT = f"INSERT INTO event ({', '.join(_WRITTEN)}, trouble) VALUES ({', '.join('?' * (len(_WRITTEN) + 1))})"


class Ledger(Database):
    """An open ledger, for several threads. A method that raises LedgerError (file can't be read or written) changed nothing.

    On a full disk guests can still be ended: there is a reserve for that (`reserve`).

    Args:
        path: the database; it and its folder are made if they are not there.
        accept: raises if these claims must not be opened; nothing was written then.
        keep: how many events of each tenant are kept, see ``retention.KEEP``.

    Raises:
        LedgerError: the file is damaged, no ledger, of a newer version, or can't be opened.
    """

    def __init__(self, path: Path, *, accept: Accept = lambda _: None, keep: int = KEEP) -> None:
        super().__init__(path, accept)
        self._listeners: list[Callable[[Event], None]] = []
        try:
            with self._explained("read"):
                self._retention = Retention(self._unsynced, keep)
        except BaseException:
            self.close()
            raise

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
        self._lock.raise_if_held_longer(limit)
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
        name, texts = plan.name, (json.dumps(to_plain(plan)), request.model_dump_json(exclude_unset=True))

        def work(now: Known) -> None:
            with self._transaction():
                if name in now.claims:
                    raise Conflict(f"there is a guest named {name} already", "choose another name, or delete that guest first")
                statement = "UPDATE generation SET number = ?1 + 1, version = max(version, ?2) WHERE number = ?1"
                if not self._db.execute(statement, (generation, now.version)).rowcount:
                    raise LostRace(f"claims have changed while guest {name} was planned (generation {generation})", "try again")
                values = (name, GuestState.CREATING, *texts, owner, now.version, 0)
                self._db.execute("INSERT INTO guest VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                self._take("claim_cpu", "cpu", "CPU", list(plan.cpus), name)
                self._take("claim_vf", "address", "VF", [str(nic.address) for nic in plan.nics], name)
                self._take("claim_mac", "mac", "Ethernet address", [str(nic.mac) for nic in plan.nics], name)
            claim = Claim(plan, GuestState.CREATING, request, owner, now.version)
            now.generation, now.claims = generation + 1, dict(sorted({**now.claims, name: claim}.items()))

        return self._change(f"write the claim of {name} to", work, begins=True).generation

    def release(self, name: str) -> None:
        """Takes back all that the guest owns. The generation stays: what was planned before can be claimed all the same.

        Raises:
            NotFound: the guest has no claim.
            Conflict: changes made for the guest are not undone yet.
        """

        def work(now: Known) -> None:
            with self._transaction():
                ((left,),) = read_rows(self._db, "SELECT count(*) FROM undo WHERE owner = ?", name)
                if left:
                    raise Conflict(f"{left} changes for guest {name} are not undone yet", "others can't get its things before")
                values = (name, now.get(name).version)
                _check_found(self._db.execute("DELETE FROM guest WHERE name = ? AND version = ?", values), name)
                self._db.execute("UPDATE generation SET version = max(version, ?)", (now.version,))
            del now.claims[name]

        self._change(f"release the claim of {name} in", work)

    def set_state(self, name: str, state: GuestState, *, restarts: int | None = None) -> Claim:
        """Notes how far the guest has come, and, if given, its count of restarts; returns the claim as it is now.

        A power cut may take back a state that is on the way to another (not one of ``SETTLED``).

        Raises:
            NotFound: the guest has no claim.
            Conflict: as ``check_transition``.
        """

        def work(now: Known) -> None:
            self._set_state(now, name, state, restarts)

        # What is to start begins something new; any other state is on the way to an end, or tells of what is so already.
        return self._change(f"note that {name} is {state} in", work, begins=state == GuestState.STARTING).claims[name]

    def quarantine(self, name: str, reasons: Sequence[str]) -> None:
        """Keeps all that the guest owns from everybody, until its state is changed again.

        Raises:
            NotFound: the guest has no claim.
            Conflict: as ``check_transition``.
        """

        def work(now: Known) -> None:
            with self._transaction():
                self._set_state(now, name, GuestState.QUARANTINED)
                values = (name, _now(), json.dumps(list(reasons)))
                self._db.execute("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?)", values)

        self._change(f"put {name} into quarantine in", work)

    def quarantined(self) -> tuple[Quarantined, ...]:
        """All that is in quarantine, by guest name."""
        with self._reading() as db:
            # The reasons stay when the state is changed again, until there are new ones.
            tables = "quarantine JOIN guest USING (name) WHERE state = 'quarantined'"
            rows = read_rows(db, f"SELECT name, since, reasons FROM {tables} ORDER BY name")
            return tuple(Quarantined(name, since, parse_reasons(name, reasons)) for name, since, reasons in rows)

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
        if not self._write("forget an undo record in", "DELETE FROM undo WHERE id = ?", id, begins=False).rowcount:
            raise NotFound(f"there is no undo record {id}")

    def pending(self, owner: str) -> tuple[UndoRecord, ...]:
        """What is still to be undone for the owner, newest first."""
        with self._reading() as db:
            rows = read_rows(db, "SELECT id, owner, action, arguments FROM undo WHERE owner = ? ORDER BY id DESC", owner)
            return tuple(UndoRecord(id, owner, action, parse_arguments(owner, text)) for id, owner, action, text in rows)

    def log(
        self, kind: EventKind, subject: str, detail: str, *, who: str = "manager", tenant: str = "", took: float | None = None
    ) -> Event:
        """Adds an event; the arguments are an Event's. It is never changed, and removed when there are many newer ones."""
        detail = detail if len(detail) <= LONGEST else f"{detail[:LONGEST]}..."
        kind = EventKind(kind)  # ValueError for a text that is not a kind
        tenant = "" if kind.visibility is Visibility.HIDDEN else tenant
        event = Event(0, _now(), kind, subject, detail, who, tenant, took)
        values = (*(getattr(event, name) for name in _WRITTEN), kind.is_trouble)
        event = replace(event, id=int(self._write("log to", _INSERT_EVENT, *values).lastrowid or 0))
        self._remove_old(event.tenant, kind)
        for call in self._listeners:
            call(event)
        return event

    def _remove_old(self, tenant: str, kind: EventKind) -> None:
        try:
            with self._lock:
                self._retention.add(tenant, kind)
        except sqlite3.Error as error:
            # The event is logged all the same. It is tried again with the next.
            _log.error("cannot remove old events of the ledger %s: %s", self._path, error)

    def events(self, after: int | None = 0, limit: int = 1000, tenant: str | None = None) -> tuple[Event, ...]:
        """Up to ``limit`` events of all tenants or of one, oldest first: the first with ids above ``after``, or, if that is None,
        the newest.
        """
        where, values = ("tenant = ? AND id > ?", [tenant]) if tenant is not None else ("id > ?", [])
        order = "DESC" if after is None else "ASC"
        with self._reading() as db:
            statement = f"SELECT {_COLUMNS} FROM event WHERE {where} ORDER BY id {order} LIMIT ?"
            rows = [Event(*row) for row in read_rows(db, statement, *values, after or 0, limit)]
            return tuple(rows[::-1] if after is None else rows)

    def last_event(self) -> int:
        """The id of the newest event; 0 if there is none."""
        with self._reading() as db:
            return int(read_rows(db, "SELECT coalesce(max(id), 0) FROM event")[0][0])

    def _set_state(self, now: Known, name: str, state: GuestState, restarts: int | None = None) -> None:
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
            taken = read_rows(self._db, f"SELECT {column} FROM {table} WHERE {column} IN (SELECT value FROM json_each(?))", text)
            if not taken:
                raise
            # Not whose: that may be another tenant's.
            raise Conflict(f"{what} {taken[0][0]} can't be given to guest {guest}: it is another guest's") from None


def _check_found(cursor: sqlite3.Cursor, name: str) -> None:
    if not cursor.rowcount:
        raise LostRace(f"guest {name} was changed by another program", "try again")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
