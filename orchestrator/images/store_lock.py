"""The locks of the image store.

A claim looks up a build and writes its hash into the ledger. If a removal came between the two, the guest would have no image. So
claims share a lock, and a removal holds it exclusively while it reads the ledger and moves the builds away: it sees every claim
that was made before, and a later claim does not find the build. The lock is held for milliseconds; files are copied and deleted
outside. It is on the folder itself (flock(2)), so that a manager that can only read the store can lock it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.images.cache import locked
from orchestrator.waiting import wait_until

CLAIM_SECONDS = 10.0
CHANGE_SECONDS = 60.0
"""Longest waits: a process that is stopped while it holds the lock must not block the others."""


@contextmanager
def keeping_builds(store: Path, *, timeout: float | None = None) -> Iterator[None]:
    """No build is removed meanwhile. Shared; without a store it does nothing. Raises ImageError after ``timeout`` seconds."""
    with _flock(store, fcntl.LOCK_SH, CLAIM_SECONDS if timeout is None else timeout):
        yield


@contextmanager
def removing_builds(store: Path, *, timeout: float | None = None) -> Iterator[None]:
    """No build is claimed meanwhile. Exclusive. Raises ImageError after ``timeout`` seconds."""
    with _flock(store, fcntl.LOCK_EX, CHANGE_SECONDS if timeout is None else timeout):
        yield


@contextmanager
def changing_store(store: Path) -> Iterator[None]:
    """One program at a time adds or removes files. Waits without limit: copies take long."""
    with locked(store / ".lock", progress=lambda _: None):
        yield


@contextmanager
def _flock(store: Path, kind: int, timeout: float) -> Iterator[None]:
    descriptor = _open(store)
    if descriptor is None:
        yield
        return
    try:
        if not wait_until(lambda: _try_flock(store, descriptor, kind), timeout=timeout, interval=0.01):
            message = f"the image store is locked by another process for more than {timeout:g} s"
            raise ImageError(message, f"find the process with `lslocks` ({store}); end it if it is stopped, then try again")
        yield
    finally:
        os.close(descriptor)


def _open(store: Path) -> int | None:
    try:
        return os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ImageError(f"cannot open the image store: {error.strerror}", f"check {store} and its mode") from None


def _try_flock(store: Path, descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        hint = f"put {store} on a file system with locks (flock(2))"
        raise ImageError(f"cannot lock the image store: {error.strerror}", hint) from None
    return True
