"""The ledger's open file: connections, transactions, the reserve for a full disk, and whether the file is still at its path.

One connection writes, one reads. A commit writes to the WAL and outlives the process; it outlives a power cut once `wait_synced`
has returned. The fsync is not part of the commit (``PRAGMA synchronous = NORMAL``), so that one fsync serves several commits and
no lock is held during it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import LedgerError
from orchestrator.ledger.group_sync import GroupSync
from orchestrator.ledger.reserve import Reserve
from orchestrator.ledger.schema import DAMAGED, check_file, is_current, migrate
from orchestrator.locks import WatchedLock

BUSY_TIMEOUT = 10.0
"""Seconds to wait for another program that holds the file."""

FSYNC = "FSYNC"
"""What a trace gets before an fsync of the WAL."""

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

# SQLite's errors for a full disk: ENOSPC of the file and of its WAL, of the WAL's index, and when these are created
# (os_unix.c). EDQUOT comes as an I/O error.
_FULL = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_CANTOPEN,
}

T = TypeVar("T")
Trace = Callable[[str], object]


class Database:
    """The file, for several threads.

    Args:
        path: created with its folder if it does not exist.
        accept: gets a copy of the content, migrated; raises if the file must not be opened. Nothing was written then.
        busy: as ``BUSY_TIMEOUT``.
        trace: called with each statement that writes, before it is executed, and with ``FSYNC``.

    Raises:
        LedgerError: the file is damaged, not a ledger, of a newer version, or cannot be opened.
    """

    def __init__(
        self, path: Path, accept: Callable[[sqlite3.Connection], object], busy: float = BUSY_TIMEOUT, trace: Trace | None = None
    ) -> None:
        self.path = path
        self._busy, self._trace = busy, trace
        self._lock = WatchedLock()
        # Readers have their own connection: with WAL they do not wait for writers.
        self._read_lock = threading.Lock()
        self._reserve = Reserve(path.with_name(f"{path.name}.reserve"))
        self._sync = GroupSync(self._sync_wal)
        self._wal: int | None = None
        self._files: dict[Path, tuple[int, int]] = {}
        self._connections: list[sqlite3.Connection] = []
        with self.mapped_errors("open"):
            _create(path)
            self.with_reserve(lambda: check_file(path, busy, accept))
            try:
                self._writer, self._reader = self._connect(), self._connect()
                self.with_reserve(self._prepare)
            except BaseException:
                self.close()
                raise
        self._reserve.restore()

    def close(self) -> None:
        """Moves the WAL into the file and closes both. Later calls raise LedgerError."""
        with self._read_lock, self._lock:
            if self._files and not self._find_missing():
                # If it fails, the next start does it. No reader is active and no other program has the file open.
                with suppress(sqlite3.Error):
                    self.with_reserve(self._checkpoint)
            self._files = {}
            self._sync.stop()
            for connection in reversed(self._connections):
                connection.close()
            if self._wal is not None:
                os.close(self._wal)
                self._wal = None

    @property
    def trouble(self) -> str:
        """Why the ledger cannot be written; empty if it can."""
        if missing := self._find_missing():
            return f"{missing} is gone or another file"
        return f"the disk of {self.path} is full" if self._reserve.used else ""

    def raise_if_stalled(self, limit: float) -> None:
        """Raises OrchestratorError if a write or an fsync has been running for more than ``limit`` seconds."""
        self._lock.raise_if_held_longer(limit)
        self._sync.raise_if_stalled(limit)

    @contextmanager
    def writing(self, what: str, *, starts_work: bool) -> Iterator[sqlite3.Connection]:
        """The connection that writes, with the lock of all writers held.

        Args:
            what: verb and object for error messages, "write the claim of web to".
            starts_work: the change begins something new, for which the reserve is not there.

        Raises:
            LedgerError: the file cannot be written, or is not the file at its path any more.
        """
        with self._lock, self.mapped_errors(what):
            self.check_files()
            if starts_work and self._reserve.used and not self._reserve.restore():
                message = f"cannot {what} the ledger {self.path}: its disk is full, and the reserve is for ending guests only"
                raise LedgerError(message, _FREE)
            if self._sync.is_broken:
                self._checkpoint()
            yield self._writer

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; within `writing`. IMMEDIATE locks out other programs before anything is read."""
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors (https://sqlite.org/lang_transaction.html).
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    def write(self, what: str, statement: str, *values: object, starts_work: bool = True) -> sqlite3.Cursor:
        """Executes one statement, a transaction of its own, which a power cut may take back. Arguments as of `writing`."""
        with self.writing(what, starts_work=starts_work) as db:
            if starts_work:
                return db.execute(statement, values)
            return self.with_reserve(lambda: db.execute(statement, values))

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection that reads."""
        with self._read_lock, self.mapped_errors("read"):
            yield self._reader

    def note_written(self) -> int:
        """Number of the last change, for `wait_synced`; within `writing`."""
        return self._sync.note_written()

    def wait_synced(self, number: int) -> None:
        """Returns when the change of this number is on the disk. Several threads share one fsync.

        Raises:
            LedgerError: the fsync has failed, or the file is not the file at its path any more.
        """
        self._sync.wait(number)

    def with_reserve(self, work: Callable[[], T]) -> T:
        """Does work that is all or nothing; on a full disk once more with each part of the reserve."""
        while True:
            try:
                return work()
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) not in _FULL or not self._reserve.release():
                    raise
            if self._connections:
                # Moves the WAL into the file if there is room; its own space is used again then.
                with suppress(sqlite3.Error):
                    self._connections[0].execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def check_files(self) -> None:
        """Raises LedgerError if a file of the ledger was moved or replaced: what is written to it dies with this process."""
        if missing := self._find_missing():
            message = f"the ledger {self.path} can't be used: {missing} was deleted or replaced while the manager had it open"
            raise LedgerError(message, "move it back, or stop the manager, restore the ledger from a copy and start again")

    @contextmanager
    def mapped_errors(self, what: str) -> Iterator[None]:
        """Raises LedgerError for SQLite's errors; ``what`` as for `writing`."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            text = " ".join(str(error).split())  # it may quote the schema, which has line breaks
            raise LedgerError(f"cannot {what} the ledger {self.path}: {text}", _HINTS.get(code & 0xFF, "")) from None
        except UnicodeDecodeError:
            # Of SQLite's message, which quotes the schema.
            raise LedgerError(f"cannot {what} the ledger {self.path}: its schema is not in UTF-8", DAMAGED) from None

    def _connect(self) -> sqlite3.Connection:
        # isolation_level None: the sqlite3 module begins no transactions of its own.
        connection = sqlite3.connect(self.path, timeout=self._busy, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        return connection

    def _prepare(self) -> None:
        db = self._writer
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA foreign_keys = OFF")
        if not is_current(db):
            db.execute("PRAGMA synchronous = FULL")
            with self.mapped_errors("make"), self.transaction():
                migrate(db)
        db.execute("PRAGMA foreign_keys = ON")
        # Commits without fsync (https://sqlite.org/pragma.html#pragma_synchronous): that is `wait_synced`.
        db.execute("PRAGMA synchronous = NORMAL")
        db.set_trace_callback(self._trace)
        wal = self.path.with_name(f"{self.path.name}-wal")
        for path in (self.path, wal):
            # By path: closing another descriptor of the database would release SQLite's locks on it (fcntl(2)).
            status = path.stat()
            self._files[path] = status.st_dev, status.st_ino
        # SQLite has no locks on the WAL itself (they are on the -shm file, https://sqlite.org/walformat.html).
        self._wal = os.open(wal, os.O_RDONLY | os.O_CLOEXEC)

    def _checkpoint(self) -> None:
        """Moves the WAL into the file, with an fsync of both: everything written so far is on the disk then."""
        ((is_blocked, *_),) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if is_blocked:
            raise sqlite3.OperationalError("the WAL cannot be moved into the file: a reader does not end")
        self._sync.reset()

    def _sync_wal(self) -> None:
        if self._trace:
            self._trace(FSYNC)
        assert self._wal is not None
        os.fdatasync(self._wal)
        # After the fsync: a change is lost if the file was deleted meanwhile.
        self.check_files()

    def _find_missing(self) -> Path | None:
        """The first file of the ledger that is not at its path any more."""
        for path, known in self._files.items():
            try:
                status = path.stat()
            except OSError:
                return path
            if (status.st_dev, status.st_ino) != known:
                return path
        return None


def _create(path: Path) -> None:
    """Creates the file readable by root alone: it shows what all tenants own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise LedgerError(f"cannot open the ledger {path}: {error.strerror}", "run as root; see `mount` and `df`") from None
