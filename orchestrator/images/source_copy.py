"""Copies and hashes large files with holes, in constant memory."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.images.cache import Progress
from orchestrator.images.sparse import open_regular, write_all

_CHUNK = 256 << 10
_ZEROS = bytes(_CHUNK)
_PERIOD = 2.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Copied:
    size: int  # bytes
    sha256: str


@contextmanager
def open_source(path: Path) -> Iterator[int]:
    """As `open_regular`, for a path that a user has given. Raises ImageError if the file cannot be opened."""
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(open_regular(path, follow=True))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ImageError(f"cannot read {path}: {reason}", "give the path of an image file") from None
        yield descriptor


def copy_sparse(source: Path, target: Path, *, limit: int, progress: Progress) -> Copied:
    """Copies a file without its holes and blocks of zeros, and hashes it in the same pass.

    Raises ImageError if the source is larger than ``limit`` bytes, changes meanwhile, or the target's file system is full.
    """
    with open_source(source) as reader, open(target, "xb", buffering=0) as file:
        before = os.fstat(reader)
        size = before.st_size
        if size > limit:
            raise ImageError(f"{source} has {size} bytes, the limit is {limit}", "give a smaller file, or a higher --max-size")
        check_space(target.parent, min(size, before.st_blocks * 512))
        digest = hashlib.sha256()
        report = _Report(f"copying {source.name}", size, progress)
        try:
            os.ftruncate(file.fileno(), size)
            for offset, block in _read_blocks(reader, size):
                digest.update(block)
                if block is not _ZEROS and block != _ZEROS[: len(block)]:
                    write_all(file.fileno(), block, offset)
                report(offset)
        except OSError as error:
            raise explain_os_error(error, f"cannot copy {source} to {target.parent}") from None
        after = os.fstat(reader)
        if (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (after.st_size, after.st_mtime_ns, after.st_ctime_ns):
            raise ImageError(f"{source} changed while it was read", "import it again when no program writes it")
    return Copied(size, digest.hexdigest())


def check_space(folder: Path, needed: int) -> None:
    """Raises ImageError if ``needed`` bytes do not fit; 128 MB, or 1 % of the file system, stay free for others."""
    state = os.statvfs(folder)
    reserve = max(128 << 20, state.f_blocks * state.f_frsize // 100)
    free = max(0, state.f_bavail * state.f_frsize - reserve)
    if needed > free:
        text = f"no space in {folder}: {needed >> 20} MB are needed, {free >> 20} MB are free"
        raise ImageError(text, "free space, or give --output DIR on another file system")


def explain_os_error(error: OSError, task: str) -> ImageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ImageError(f"{task}: {error.strerror}", "free space, or give --output DIR on another file system")
    return ImageError(f"{task}: {error.strerror}")


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """At most ``length`` bytes; fewer only at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(descriptor, min(length, 1 << 20), offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


class _Report:
    """Reports the progress of a pass over a file, at most every two seconds."""

    def __init__(self, task: str, size: int, progress: Callable[[str], None]) -> None:
        self._task, self._size, self._progress = task, size, progress
        self._next = time.monotonic() + _PERIOD

    def __call__(self, offset: int) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + _PERIOD
            self._progress(f"{self._task}: {offset >> 20} of {self._size >> 20} MB")


def _read_blocks(descriptor: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The file in order. A block of a hole is ``_ZEROS`` or a part of it. Stops early if the file shrinks."""
    offset = 0
    while offset < size:
        start, end = _find_data(descriptor, offset, size)
        while offset < start:
            length = min(_CHUNK, start - offset)
            yield offset, _ZEROS if length == _CHUNK else _ZEROS[:length]
            offset += length
        while offset < end:
            block = os.pread(descriptor, min(_CHUNK, end - offset), offset)
            if not block:
                return
            yield offset, block
            offset += len(block)


def _find_data(descriptor: int, offset: int, size: int) -> tuple[int, int]:
    """The next range with data; (size, size) if only a hole follows."""
    try:
        start = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size, size
        return offset, size  # the file system does not know holes
    return min(start, size), min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
