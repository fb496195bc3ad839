"""Locks that go by a guest's name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
