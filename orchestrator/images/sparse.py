"""Copies and hashes large files with holes in bounded memory: a hole is neither read nor written."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from errno import ELOOP, ENXIO
from pathlib import Path

from orchestrator.errors import ImageError

_BLOCK = 1 << 20
_ZEROS = bytes(_BLOCK)


def open_regular(path: Path) -> int:
    """A descriptor to read the file. A symlink, device, pipe or folder raises ImageError, and none of them is opened for long."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (ELOOP, ENXIO):  # a symlink; a socket, or a device without a driver
            raise
        raise _not_regular(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a regular file."""
    descriptor = open_regular(path)
    try:
        return _process(descriptor, None)
    finally:
        os.close(descriptor)


def copy_hashed(source: Path, target: Path) -> tuple[int, str]:
    """Copies a regular file with its holes to a new file that all may read; returns when it is on the disk.

    Returns size and SHA-256 of what was copied.
    """
    read = open_regular(source)
    try:
        write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(write, 0o644)  # whatever the umask is: QEMU runs as another user
            found = _process(read, write)
            os.ftruncate(write, found[0])
            os.fsync(write)
        finally:
            os.close(write)
    finally:
        os.close(read)
    return found


def _process(read: int, write: int | None) -> tuple[int, str]:
    digest, at = hashlib.sha256(), 0
    for start, end in _list_data(read):
        _add_zeros(digest, start - at)
        at = start
        while at < end:
            block = os.pread(read, min(_BLOCK, end - at), at)
            if not block:
                break
            digest.update(block)
            if write is not None:
                _write_all(write, block, at)
            at += len(block)
    size = os.fstat(read).st_size
    _add_zeros(digest, size - at)
    return max(size, at), digest.hexdigest()


def _list_data(descriptor: int) -> Iterator[tuple[int, int]]:
    """The parts of a file with data (lseek(2)); a file system that does not know holes reports one part."""
    end, size = 0, os.fstat(descriptor).st_size
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != ENXIO:
                raise
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def _write_all(descriptor: int, block: bytes, at: int) -> None:
    view = memoryview(block)
    while view:
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done


def _add_zeros(digest: hashlib._Hash, count: int) -> None:
    while count > 0:
        digest.update(_ZEROS[: min(count, _BLOCK)])
        count -= _BLOCK


def _not_regular(path: Path) -> ImageError:
    return ImageError(f"{path} is not a regular file", "replace it by a file: an image has no links, devices or folders")
