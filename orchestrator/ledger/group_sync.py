"""One fdatasync(2) for all changes that wait for the disk at the same time (group commit)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from orchestrator.errors import LedgerError
from orchestrator.locks import WatchedLock


class GroupSync:
    """Numbers changes in write order and waits until they are on the disk.

    The first waiting thread calls ``sync``; threads that arrive meanwhile wait for the next call, which covers all of them.

    After a failed sync every wait fails until `reset`: the kernel reports an error once and marks the pages clean, so a second
    fdatasync(2) succeeds without having written them (https://lwn.net/Articles/752063/).
    """

    def __init__(self, sync: Callable[[], object]) -> None:
        self._sync = sync
        self._condition = threading.Condition()
        self._running = WatchedLock()
        self._written = self._synced = 0
        # Changes of a failed sync whose threads have not raised its error yet; and the last error.
        self._failed: set[int] = set()
        self._error: Exception | None = None
        self._is_broken = self._is_busy = False

    @property
    def is_broken(self) -> bool:
        """A sync has failed and `reset` was not called since."""
        return self._is_broken

    def note_written(self) -> int:
        """Numbers the change that was just written; the caller holds the lock of all writers."""
        with self._condition:
            self._written += 1
            return self._written

    def wait(self, number: int) -> None:
        """Returns when the change is on the disk. Raises LedgerError if the sync that covers it failed."""
        covered = self._take_turn(number)
        if not covered:
            return
        error: Exception | None = None
        try:
            with self._running:
                self._sync()
        except Exception as failure:
            error = failure
        with self._condition:
            self._is_busy = False
            if error is None:
                self._synced = max(self._synced, covered)
            else:
                self._failed.update(range(self._synced + 1, covered + 1))
                self._error = error
                self._is_broken = self._is_broken or not isinstance(error, LedgerError)
            self._condition.notify_all()
            self._check(number)

    def reset(self) -> None:
        """After a checkpoint: everything written is on the disk. The caller holds the lock of all writers."""
        with self._condition:
            self._synced, self._is_broken = self._written, False

    def stop(self) -> None:
        """Waits for a running sync. Later waits for changes that are not on the disk fail."""
        with self._condition:
            self._condition.wait_for(lambda: not self._is_busy)
            self._is_broken, self._error = True, LedgerError("the ledger is closed")

    def raise_if_stalled(self, limit: float) -> None:
        """Raises OrchestratorError if a sync has been running for more than ``limit`` seconds."""
        self._running.raise_if_held_longer(limit)

    def _take_turn(self, number: int) -> int:
        """The last change that the caller's sync will cover, 0 if the change is on the disk."""
        with self._condition:
            while True:
                self._check(number)
                if self._synced >= number:
                    return 0
                if not self._is_busy:
                    self._is_busy = True
                    return self._written
                self._condition.wait()

    def _check(self, number: int) -> None:
        if self._error and (number in self._failed or (self._is_broken and self._synced < number)):
            self._failed.discard(number)
            if isinstance(self._error, LedgerError):
                raise LedgerError(self._error.message, self._error.hint)
            reason = getattr(self._error, "strerror", None) or self._error
            raise LedgerError(f"cannot sync the ledger: {reason}", "check the disk with `dmesg` and `df`")
