"""The ledger's open file: connections, transactions and the reserve for a full disk.

One connection writes, one reads. A commit is in the WAL and outlives the process; it outlives a power cut after `wait_synced`.
The fsync is not part of the commit (``PRAGMA synchronous = NORMAL``): one fsync serves several commits, without a lock.
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
"""The argument of a trace call before an fsync of the WAL."""

_FREE = "free some space on its disk, then try again"
_HINTS = {
    sqlite3.SQLITE_FULL: _FREE,
    sqlite3.SQLITE_READONLY: "run as root, and check with `mount` and `lsattr` that its disk and folder can be written",
    sqlite3.SQLITE_CANTOPEN: "run as root, and check its path and, with `mount` and `df`, that its folder can be written",
    sqlite3.SQLITE_BUSY: "stop the other program that uses it: only one manager may run on a host",
    sqlite3.SQLITE_IOERR: "check with `dmesg` and `df` whether the disk reports errors or is full",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_CONSTRAINT: DAMAGED,
    sqlite3.SQLITE_NOTADB: "give the manager another path: this file is not a database",
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
        accept: receives a migrated copy of the content before anything is written; raises to refuse the file.
        busy: as ``BUSY_TIMEOUT``.
        trace: called before each statement that writes, and with ``FSYNC``.

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
        self._files: dict[str, tuple[int, int]] = {}
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
        """Moves the WAL into the file. Later calls raise LedgerError."""
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
        """The reason why the ledger cannot be written; empty if it can."""
        if missing := self._find_missing():
            return f"{missing} was deleted or replaced"
        return f"the disk of {self.path} is full" if self._reserve.used else ""

    def raise_if_stalled(self, limit: float) -> None:
        """Raises OrchestratorError if a write or an fsync has been running for more than ``limit`` seconds."""
        self._lock.raise_if_held_longer(limit)
        self._sync.raise_if_stalled(limit)

    @contextmanager
    def writing(self, what: str, *, starts_work: bool) -> Iterator[sqlite3.Connection]:
        """Holds the lock of all writers. Raises LedgerError if the file cannot be written or was moved or replaced.

        Args:
            what: verb and object for error messages, "write the claim of web to".
            starts_work: the change starts new work, which may not use the reserve.
        """
        with self._lock, self.mapped_errors(what):
            self.check_files()
            if starts_work and self._reserve.used and not self._reserve.restore():
                message = f"cannot {what} the ledger {self.path}: its disk is full, and the reserve is for stopping guests only"
                raise LedgerError(message, _FREE)
            if self._sync.is_broken:
                self._checkpoint()
            yield self._writer

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Within `writing`. IMMEDIATE locks other programs out before the first read."""
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            # After some errors SQLite has rolled back already (https://sqlite.org/lang_transaction.html).
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    def write(self, what: str, statement: str, *values: object, starts_work: bool = True) -> sqlite3.Cursor:
        """Executes one statement as a transaction, which a power cut may revert."""
        with self.writing(what, starts_work=starts_work) as db:
            if starts_work:
                return db.execute(statement, values)
            return self.with_reserve(lambda: db.execute(statement, values))

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock, self.mapped_errors("read"):
            yield self._reader

    def note_written(self) -> int:
        """The number of the last change, for `wait_synced`; within `writing`."""
        return self._sync.note_written()

    def wait_synced(self, number: int) -> None:
        """Returns when this change is on the disk. Threads that wait at the same time share one fsync.

        Raises LedgerError if the fsync failed, or the file was moved or replaced.
        """
        self._sync.wait(number)

    def with_reserve(self, work: Callable[[], T]) -> T:
        """Calls ``work``, a transaction. On a full disk, releases the parts of the reserve one by one and repeats it."""
        while True:
            try:
                return work()
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) not in _FULL or not self._reserve.release():
                    raise
            if self._connections:
                # Moves the WAL into the file if there is space, and lets SQLite reuse the WAL from its start.
                with suppress(sqlite3.Error):
                    self._connections[0].execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def check_files(self) -> None:
        """Raises LedgerError if a file was moved or replaced: writes to it would be lost with this process."""
        if missing := self._find_missing():
            message = f"the ledger {self.path} can't be used: {missing} was deleted or replaced while the manager had it open"
            raise LedgerError(message, "move it back, or stop the manager, restore the ledger from a copy and start again")

    @contextmanager
    def mapped_errors(self, what: str) -> Iterator[None]:
        """Raises SQLite's errors as LedgerError; ``what`` as for `writing`."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            text = " ".join(str(error).split())  # the text may quote the schema, which has line breaks
            raise LedgerError(f"cannot {what} the ledger {self.path}: {text}", _HINTS.get(code & 0xFF, "")) from None
        except UnicodeDecodeError:
            # SQLite's message quotes the schema.
            raise LedgerError(f"cannot {what} the ledger {self.path}: its schema is not in UTF-8", DAMAGED) from None

    def _connect(self) -> sqlite3.Connection:
        # isolation_level None: the sqlite3 module does not start transactions.
        connection = sqlite3.connect(self.path, timeout=self._busy, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        return connection

    def _prepare(self) -> None:
        db = self._writer
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA foreign_keys = OFF")
        if not is_current(db):
            db.execute("PRAGMA synchronous = FULL")
            with self.mapped_errors("create"), self.transaction():
                migrate(db)
        db.execute("PRAGMA foreign_keys = ON")
        # Commits without fsync (https://sqlite.org/pragma.html#pragma_synchronous): that is `wait_synced`.
        db.execute("PRAGMA synchronous = NORMAL")
        db.set_trace_callback(self._trace)
        wal = self.path.with_name(f"{self.path.name}-wal")
        for path in (self.path, wal):
            # By path: closing another descriptor of the database would release SQLite's locks on it (fcntl(2)).
            status = path.stat()
            self._files[str(path)] = status.st_dev, status.st_ino
        # SQLite has no locks on the WAL itself (they are on the -shm file, https://sqlite.org/walformat.html).
        self._wal = os.open(wal, os.O_RDONLY | os.O_CLOEXEC)

    def _checkpoint(self) -> None:
        """Moves the WAL into the file, with an fsync of both: everything written so far is on the disk then."""
        ((is_blocked, *_),) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if is_blocked:
            raise sqlite3.OperationalError("the WAL cannot be moved into the file: another program keeps reading")
        self._sync.reset()

    def _sync_wal(self) -> None:
        if self._trace:
            self._trace(FSYNC)
        assert self._wal is not None
        os.fdatasync(self._wal)
        # After the fsync: a change is lost if the file was deleted meanwhile.
        self.check_files()

    def _find_missing(self) -> str | None:
        """The first file of the ledger that was moved or replaced."""
        for path, known in self._files.items():
            try:
                status = os.stat(path)
            except OSError:
                return path
            if (status.st_dev, status.st_ino) != known:
                return path
        return None


def _create(path: Path) -> None:
    """Readable by root only: the file shows what all tenants own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise LedgerError(f"cannot open the ledger {path}: {error.strerror}", "run as root, and check `mount` and `df`") from None
