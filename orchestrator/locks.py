"""Exclusive locks on files (flock(2)). The kernel releases one with the last copy of its descriptor, however the holder ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock_file(path: Path, *, mode: int = 0o600, create: bool = True, wait: bool = False) -> int:
    """Opens the file and locks it; closing the returned descriptor releases the lock.

    Raises:
        BlockingIOError: another process holds the lock (never with ``wait``).
        OSError: the file cannot be opened or, without ``create``, does not exist.
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
        # The last holder removed the file between our open(2) and flock(2): a lock on it excludes no other process.
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
