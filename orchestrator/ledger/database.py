"""The ledger's open file: connections, transactions, the reserve for a full disk, and whether the file is still at its path."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import LedgerError, LostRace
from orchestrator.ledger.loading import Known, load
from orchestrator.ledger.reserve import Reserve
from orchestrator.ledger.schema import DAMAGED, check_file, is_current, migrate
from orchestrator.locks import WatchedLock
from orchestrator.model.claim import Claim

_BUSY = 10.0

_FREE = "free some space on its disk, then try again"
_HINTS = {
    sqlite3.SQLITE_FULL: _FREE,
    sqlite3.SQLITE_READONLY: "its disk or folder can't be written: run as root; see `mount` and `lsattr`",
    sqlite3.SQLITE_CANTOPEN: "its folder can't be written or the path is wrong: run as root; see `mount` and `df`",
    sqlite3.SQLITE_BUSY: "another program holds it; only one manager may run on a host",
    sqlite3.SQLITE_IOERR: "the disk reports errors, or is full: see `dmesg` and `df`",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_CONSTRAINT: DAMAGED,
    sqlite3.SQLITE_NOTADB: "it is another kind of file: give the manager another path",
}

# How SQLite tells of a disk that is full: ENOSPC of the file and of its WAL, of its index of the WAL, and when these are made
# (os_unix.c). EDQUOT comes as an I/O error.
_FULL = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_CANTOPEN,
}

T = TypeVar("T")
Accept = Callable[[Sequence[Claim]], object]


class Database:
    """The file and what is known of it, for several threads.

    Args:
        path: the database; it and its folder are made if they are not there.
        accept: raises if these claims must not be opened; nothing was written then.

    Raises:
        LedgerError: the file is damaged, no ledger, of a newer version, or can't be opened.
    """

    def __init__(self, path: Path, accept: Accept) -> None:
        self._path = path
        self._lock = WatchedLock()
        # Readers have a connection of their own: with WAL they need not wait until what others write is on the disk.
        self._read_lock = threading.Lock()
        self._reserve = Reserve(path.with_name(f"{path.name}.reserve"))
        self._files: dict[Path, tuple[int, int]] = {}
        self._connections: list[sqlite3.Connection] = []
        with self._explained("open"):
            _create(path)
            self._with_reserve(lambda: check_file(path, _BUSY, lambda copy: accept(tuple(self._load(copy).claims.values()))))
            try:
                self._db, self._unsynced, self._reader = self._connect(), self._connect(), self._connect()
                self._with_reserve(self._prepare)
            except BaseException:
                self.close()
                raise
        self._reserve.restore()

    def close(self) -> None:
        """Moves all into the one file, and closes it. The ledger can't be used afterwards."""
        with self._read_lock, self._lock:
            if self._files and not self._find_missing():
                # Else it is done at the next start. Readers have ended, and no other program has the file open.
                with suppress(sqlite3.Error):
                    self._with_reserve(lambda: self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
            self._files = {}
            for connection in reversed(self._connections):
                connection.close()

    @property
    def trouble(self) -> str:
        """What keeps it from being written, in words; empty if nothing does."""
        if missing := self._find_missing():
            return f"{missing} is gone or another file"
        return f"the disk of {self._path} is full" if self._reserve.used else ""

    def _connect(self) -> sqlite3.Connection:
        # isolation_level None: the sqlite3 module begins no transactions of its own.
        connection = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        return connection

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA foreign_keys = OFF")
        if not is_current(self._db):
            with self._explained("make"), self._transaction():
                migrate(self._db)
        self._db.execute("PRAGMA foreign_keys = ON")
        # With WAL, NORMAL syncs nothing at a commit (https://sqlite.org/pragma.html#pragma_synchronous).
        self._db.execute("PRAGMA synchronous = FULL")
        self._unsynced.execute("PRAGMA synchronous = NORMAL")
        self._known = self._load(self._db)
        for path in (self._path, self._path.with_name(f"{self._path.name}-wal")):
            # By path: opening and closing a file of SQLite's would release the locks that this process holds on it (fcntl(2)).
            found = path.stat()
            self._files[path] = found.st_dev, found.st_ino

    def _load(self, db: sqlite3.Connection) -> Known:
        try:
            return load(db)
        except ValueError as error:
            raise LedgerError(f"the ledger {self._path} holds {error}", DAMAGED) from None

    def _change(self, what: str, work: Callable[[Known], object], *, begins: bool = False) -> Known:
        """A change of claims, by one statement or by one transaction; on the disk when this ends, or not done at all.

        Args:
            work: makes it, in the file and in what is known; called once more after an error for want of space.
            begins: it begins something new, for which the reserve is not there.

        Raises:
            LostRace: another program has changed the file; what it holds is known now.
            LedgerError: it can't be written, or is not the file at its path any more.
        """

        def attempt() -> Known:
            now = Known(self._known.generation, self._known.version + 1, dict(self._known.claims))
            try:
                work(now)
            except LostRace:
                self._known = self._load(self._db)
                raise
            return now

        with self._writing(what, begins=begins):
            now = attempt() if begins else self._with_reserve(attempt)
            # Again, before the change is reported: it is lost if the file was deleted meanwhile.
            self._check_files()
            self._known = now
            return now

    def _write(self, what: str, statement: str, *values: object, begins: bool = True) -> sqlite3.Cursor:
        """One statement, which is a transaction of its own: a power cut may take it back, but no kill of this process can."""
        with self._writing(what, begins=begins):
            if begins:
                return self._unsynced.execute(statement, values)
            return self._with_reserve(lambda: self._unsynced.execute(statement, values))

    @contextmanager
    def _writing(self, what: str, *, begins: bool) -> Iterator[None]:
        with self._lock, self._explained(what):
            self._check_files()
            if begins and self._reserve.used and not self._reserve.restore():
                message = f"cannot {what} the ledger {self._path}: its disk is full, and the reserve is for ending guests only"
                raise LedgerError(message, _FREE)
            yield

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

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock, self._explained("read"):
            yield self._reader

    def _with_reserve(self, work: Callable[[], T]) -> T:
        """Does what is all or nothing, on a full disk with the space that is kept for it."""
        while True:
            try:
                return work()
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) not in _FULL or not self._reserve.release():
                    raise
            if self._connections:
                # What is in the WAL goes to its place in the file, if there is room; its own room is used again then.
                with suppress(sqlite3.Error):
                    self._connections[0].execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def _find_missing(self) -> Path | None:
        """A file of the ledger that is not at its path any more: what is written to it would be lost with this process."""
        for path, known in self._files.items():
            try:
                found = path.stat()
            except OSError:
                return path
            if (found.st_dev, found.st_ino) != known:
                return path
        return None

    def _check_files(self) -> None:
        if missing := self._find_missing():
            message = f"the ledger {self._path} can't be used: {missing} was deleted or replaced while the manager had it open"
            raise LedgerError(message, "move it back, or stop the manager, restore the ledger from a copy and start again")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            said = " ".join(str(error).split())  # it may quote a part of the schema, with its line breaks
            raise LedgerError(f"cannot {what} the ledger {self._path}: {said}", _HINTS.get(code & 0xFF, "")) from None
        except UnicodeDecodeError:
            # Of SQLite's message, which quotes the schema.
            raise LedgerError(f"cannot {what} the ledger {self._path}: its schema is not in UTF-8", DAMAGED) from None


def _create(path: Path) -> None:
    """Makes the file readable by root alone: it tells what all guests own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise LedgerError(f"cannot open the ledger {path}: {error.strerror}", "run as root; see `mount` and `df`") from None
