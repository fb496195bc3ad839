"""Copies and hashes large files with holes in bounded memory: a hole is neither read nor written."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENXIO
from pathlib import Path

from orchestrator.errors import ImageError

_BLOCK = 1 << 20
_ZEROS = bytes(_BLOCK)

_KINDS = (
    (stat.S_ISLNK, "symbolic link"), (stat.S_ISDIR, "directory"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"),
    (stat.S_ISBLK, "block device"), (stat.S_ISCHR, "character device"),
)  # fmt: skip


@contextmanager
def open_regular(path: Path, *, follow: bool = False) -> Iterator[int]:
    """A descriptor of a regular file. Raises OSError, and ImageError for another kind: no FIFO blocks, no device is opened.

    ``follow``: also through a symbolic link, as for the path that a user gives. A file of an image is never one.
    """
    _check_kind(path, os.stat(path, follow_symlinks=follow).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
        yield descriptor
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a regular file."""
    with open_regular(path) as descriptor:
        return _process(descriptor, None)


def copy_hashed(source: Path, target: Path) -> tuple[int, str]:
    """Copies a regular file with its holes to a new file that all may read; returns when it is on the disk.

    Returns size and SHA-256 of what was copied.
    """
    with open_regular(source) as read:
        write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(write, 0o644)  # whatever the umask is: QEMU runs as another user
            found = _process(read, write)
            os.ftruncate(write, found[0])
            os.fsync(write)
        finally:
            os.close(write)
    return found


def move_hashed(source: Path, target: Path) -> tuple[int, str]:
    """As `copy_hashed`, but renames the file, which must be on the file system of the target."""
    with open_regular(source) as descriptor:
        os.fchmod(descriptor, 0o644)
        found = _process(descriptor, None)
        os.fsync(descriptor)
    source.rename(target)
    return found


def write_all(descriptor: int, block: bytes, at: int) -> None:
    view = memoryview(block)
    while view:
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done


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
                write_all(write, block, at)
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


def _add_zeros(digest: hashlib._Hash, count: int) -> None:
    while count > 0:
        digest.update(_ZEROS[: min(count, _BLOCK)])
        count -= _BLOCK


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "special file")
        raise ImageError(f"{path} is a {kind}, expected a regular file", "put a regular file in its place")
