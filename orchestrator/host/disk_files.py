"""Files that are the emulated disks of guests."""

from __future__ import annotations

import hashlib
import os
from errno import ENOENT
from pathlib import Path

from orchestrator.errors import Conflict, HostError, ImageError
from orchestrator.host.block import CHUNK, BlockProgress, Report, is_zero
from orchestrator.host.sync import sync_path


def check_absent(file: Path) -> None:
    """Raises Conflict if the file exists, HostError if its folder does not."""
    if os.path.lexists(file):
        raise Conflict(f"file {file} exists already: it is not the manager's", "move it away, or choose another guest name")
    if not file.parent.is_dir():
        raise HostError(f"folder {file.parent} does not exist", f"`mkdir {file.parent}`, or change [disks] emulated", ENOENT)


def create_file(file: Path, size: int) -> None:
    """Creates a file of zeros for root only, with all its blocks allocated, so that a full disk cannot stop the guest later."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_path(file.parent)
    except OSError as error:
        hint = f"check free space with `df {file.parent}`"
        raise HostError(f"cannot create file {file} of {size} bytes", hint, error.errno or 0) from None


def copy_image(file: Path, image: Path, report: Report, sha256: str) -> None:
    """Writes an image to the start of a new file. Raises ImageError if the image differs from its hash, HostError on errors."""
    digest, length = hashlib.sha256(), image.stat().st_size
    try:
        with image.open("rb") as source, file.open("r+b") as target:
            done = 0
            while piece := source.read(CHUNK):
                digest.update(piece)
                if not is_zero(piece):
                    target.seek(done)
                    target.write(piece)
                done += len(piece)
                report(BlockProgress(file.name, "write", done, length))
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise HostError(f"cannot write image {image} to {file}", "check the kernel log with dmesg", error.errno or 0) from None
    if digest.hexdigest() != sha256:
        raise ImageError(f"image {image}: sha256 {digest.hexdigest()}, expected {sha256}", "build or import the image again")


def remove_file(file: Path) -> None:
    """No-op if it does not exist."""
    try:
        file.unlink(missing_ok=True)
        if file.parent.is_dir():
            sync_path(file.parent)
    except OSError as error:
        raise HostError(f"cannot remove file {file}", f"`rm {file}`", error.errno or 0) from None
