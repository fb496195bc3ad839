"""Locks between threads: one per name, and one that knows for how long it has been held."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from orchestrator.errors import OrchestratorError


class Locks:
    """A re-entrant lock for each name that somebody holds or waits for."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.RLock, int]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Held for the time of the block."""
        with self._using(name) as lock, lock:
            yield

    @contextmanager
    def if_free(self, name: str) -> Iterator[bool]:
        """As a call, but does not wait; gives whether it is held."""
        with self._using(name) as lock:
            held = lock.acquire(blocking=False)
            try:
                yield held
            finally:
                if held:
                    lock.release()

    @contextmanager
    def _using(self, name: str) -> Iterator[threading.RLock]:
        with self._guard:
            lock, users = self._locks.get(name, (threading.RLock(), 0))
            self._locks[name] = lock, users + 1
        try:
            yield lock
        finally:
            with self._guard:
                users = self._locks[name][1] - 1
                self._locks[name] = lock, users
                if not users:
                    del self._locks[name]


class WatchedLock:
    """A re-entrant lock that knows how long it has been held."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._since: float | None = None

    def __enter__(self) -> WatchedLock:
        self.acquire()
        return self

    def acquire(self, *, blocking: bool = True) -> bool:
        """Takes the lock, waiting for it if ``blocking``; returns whether it is ours. Give it back with ``release``."""
        if not self._lock.acquire(blocking):
            return False
        self._depth += 1
        if self._depth == 1:
            self._since = time.monotonic()
        return True

    @contextmanager
    def try_acquire(self) -> Iterator[bool]:
        """As a ``with`` on the lock, but does not wait; gives whether it is held."""
        held = self.acquire(blocking=False)
        try:
            yield held
        finally:
            if held:
                self.release()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lock back."""
        self._depth -= 1
        if not self._depth:
            self._since = None
        self._lock.release()

    @property
    def held(self) -> float:
        """Seconds since it was taken, 0 if it is free."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def check(self, limit: float) -> None:
        """Looks whether somebody hangs who has it.

        Raises:
            OrchestratorError: it has been held for longer than ``limit`` seconds.
        """
        if (held := self.held) > limit:
            raise OrchestratorError(f"one change has been going on for {held:.0f} s, more than {limit:g} s")
