"""Disk space for a full disk: an allocated file without content, next to the ledger.

It lets guests be stopped and cleaned up. New work never gets it: a tenant that fills the disk could use it up.
"""

from __future__ import annotations

import contextlib
import logging
import os
from errno import EDQUOT, ENOSPC
from pathlib import Path

_log = logging.getLogger(__name__)

# Stopping a guest writes some 40 pages of 4 KiB to the WAL, which SQLite reuses after a checkpoint.
_SIZE = 2 << 20
_PART = 512 << 10


class Reserve:
    """Called by one thread at a time; raises nothing.

    Attributes:
        used: a part was released and is not restored yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.used = False

    def release(self) -> bool:
        """Releases a part to the file system; False if none is left."""
        try:
            size = os.stat(self._path).st_size - _PART
            if size < 0:
                return False
            os.truncate(self._path, size)
        except OSError:
            return False
        if not self.used:
            _log.warning(
                "the disk of %s is full: guests can be stopped, but not created or started until space is freed",
                self._path.parent,
            )
        self.used = True
        return True

    def restore(self) -> bool:
        """Allocates all of it again; returns whether that succeeded.

        A file system that cannot allocate space in advance has no reserve, and refuses nothing for lack of it.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            return self._note(error)
        try:
            before = os.fstat(descriptor).st_size
            if before < _SIZE:
                self._extend(descriptor, before)
        except OSError as error:
            return self._note(error)
        finally:
            os.close(descriptor)
        if self.used:
            _log.info("the disk of %s has space again", self._path.parent)
        self.used = False
        return True

    @staticmethod
    def _extend(descriptor: int, before: int) -> None:
        try:
            os.posix_fallocate(descriptor, 0, _SIZE)
        except OSError:
            # A part of the allocation may have succeeded; other writers need that space.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            raise

    def _note(self, error: OSError) -> bool:
        self.used = error.errno in (ENOSPC, EDQUOT)
        if not self.used:
            _log.warning("cannot reserve disk space for the ledger: %s: %s", self._path, error.strerror)
        return not self.used
