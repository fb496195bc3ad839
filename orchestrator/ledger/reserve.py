"""Disk space that is reserved for a full disk: a file next to the ledger, allocated and without content.

With it guests can still be ended. New work never gets it; otherwise a tenant that fills the disk would use it up too.
"""

from __future__ import annotations

import contextlib
import logging
import os
from errno import EDQUOT, ENOSPC
from pathlib import Path

_log = logging.getLogger(__name__)

# An end of a guest writes some 40 pages of 4 KiB to the WAL, and SQLite uses that anew when it is told to move it into the file.
_SIZE = 2 << 20
_PART = 512 << 10


class Reserve:
    """The file. Its methods are called by one thread at a time, and raise nothing.

    Attributes:
        used: some of it was given back to the file system, and is not there again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.used = False

    def release(self) -> bool:
        """Gives a part back to the file system; returns whether there was any."""
        try:
            left = os.stat(self._path).st_size - _PART
            if left < 0:
                return False
            os.truncate(self._path, left)
        except OSError:
            return False
        if not self.used:
            _log.warning(
                "the disk of %s is full: guests can be ended, but none can be created or started until space is freed",
                self._path.parent,
            )
        self.used = True
        return True

    def restore(self) -> bool:
        """Takes all of it from the file system again; returns whether it is there.

        On a file system that can't allocate space in advance there is no reserve, and nothing is refused for want of one.
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
            _log.info("there is space on the disk of %s again", self._path.parent)
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
            _log.warning("nothing of the disk is kept in reserve for the ledger: %s: %s", self._path, error.strerror)
        return not self.used
