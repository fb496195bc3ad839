"""Locks: on a file, per name, and with a time limit; calls one after another."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from orchestrator.errors import OrchestratorError

_Result = TypeVar("_Result")

# Calls of other threads that one thread runs in a row before another thread continues.
_IN_A_ROW = 16


def lock_file(path: Path, *, mode: int = 0o600, create: bool = True, wait: bool = False) -> int:
    """Opens the file and locks it (flock(2)). Closing the last copy of the returned descriptor releases the lock.

    Raises BlockingIOError if another process holds the lock (never with ``wait``), OSError if the file cannot be opened.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        descriptor = os.open(path, flags, mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The last holder removed the file between open(2) and flock(2): a lock on it excludes no other process.
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class NamedLocks:
    """One re-entrant lock per name, which exists while a thread holds it or waits for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.RLock, int]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with self._using(name) as lock, lock:
            yield

    @contextmanager
    def try_acquire(self, name: str) -> Iterator[bool]:
        """Does not wait; yields whether the lock is held."""
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
    """A re-entrant lock that records how long it has been held."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._since: float | None = None

    def __enter__(self) -> WatchedLock:
        self.acquire()
        return self

    def acquire(self, *, blocking: bool = True) -> bool:
        if not self._lock.acquire(blocking):
            return False
        self._depth += 1
        if self._depth == 1:
            self._since = time.monotonic()
        return True

    @contextmanager
    def try_acquire(self) -> Iterator[bool]:
        """Does not wait; yields whether the lock is held."""
        held = self.acquire(blocking=False)
        try:
            yield held
        finally:
            if held:
                self.release()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._since = None
        self._lock.release()

    @property
    def held_seconds(self) -> float:
        """0 if the lock is free."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def raise_if_held_longer(self, limit: float) -> None:
        """Raises OrchestratorError if the lock has been held for more than ``limit`` seconds."""
        if (held := self.held_seconds) > limit:
            raise OrchestratorError(f"lock held for {held:.0f} s, limit {limit:g} s")


class _Call:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        # Released when the call is done, or when its thread must run the calls that wait.
        self.turn = threading.Lock()
        self.turn.acquire()


class CallQueue:
    """Runs calls one at a time, in the order in which they came. Not re-entrant.

    A call may run in the thread of another caller: a thread that has run its own call also runs those that wait. A lock would
    pass from thread to thread for each call, and each time the next thread would wait for the processor and the interpreter; or
    it would go to a thread that came later, and some calls would wait many times as long as others.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running = WatchedLock()
        self._waiting: deque[_Call] = deque()
        self._is_busy = False

    def run(self, work: Callable[[], _Result]) -> _Result:
        """Returns what ``work`` returns and raises what it raises. ``work`` must not need a lock that a caller holds."""
        call = _Call(work)
        with self._guard:
            if waits := self._is_busy:
                self._waiting.append(call)
            self._is_busy = True
        if waits:
            call.turn.acquire()
        if not call.is_done:
            self._run(call)
            self._run_others()
        try:
            if call.error:
                raise call.error
            result: _Result = call.result
            return result
        finally:
            del call  # an error refers to this frame, and the call to the error

    @property
    def count(self) -> int:
        """The number of calls that wait."""
        return len(self._waiting)

    def raise_if_held_longer(self, limit: float) -> None:
        """Raises OrchestratorError if a call has been running for more than ``limit`` seconds."""
        self._running.raise_if_held_longer(limit)

    def _run(self, call: _Call) -> None:
        try:
            with self._running:
                call.result = call.work()
        except BaseException as error:
            call.error = error
        call.is_done = True

    def _run_others(self) -> None:
        for _ in range(_IN_A_ROW):
            if not (call := self._next()):
                return
            self._run(call)
            call.turn.release()
        if call := self._next():
            call.turn.release()  # its thread continues

    def _next(self) -> _Call | None:
        with self._guard:
            if self._waiting:
                return self._waiting.popleft()
            self._is_busy = False
            return None
