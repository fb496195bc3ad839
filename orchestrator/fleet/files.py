"""Files that are replaced as a whole, also if the disk is full."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Readers find the former content or all of the new one. It is on the disk when this returns.

    Raises OSError; then the file is as before, and no part of the new content is left.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """New and removed names of a folder outlive a power cut after this. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
