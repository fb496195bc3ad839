"""Reads every byte of an installed build and compares it with the hashes that were written when it was installed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.images.description import FILE, FileRecord
from orchestrator.images.sparse import hash_file
from orchestrator.images.store import BUILDS, Image, read_content_hash


@dataclass(frozen=True)
class Verified:
    """The result for one file; ``problem`` is empty if it is the file that was installed."""

    file: str
    problem: str = ""


def verify(image: Image) -> tuple[Verified, ...]:
    """All files of the build in its order: the description first. A file without a hash is a problem, not a pass."""
    results = [Verified(FILE, _check_description(image))]
    for name, record in sorted(image.files.items()):
        results.append(Verified(name, _check_file(image.folder / name, record)))
    unknown = {entry.name for entry in os.scandir(image.folder)} - set(image.files) - {FILE}
    results += [Verified(name, "not part of the build") for name in sorted(unknown) if image.files]
    results += [
        Verified(name, "no hash was recorded: installed by an earlier version") for name in sorted(unknown) if not image.files
    ]
    return tuple(results)


def _check_description(image: Image) -> str:
    if not image.files:
        return "no hash was recorded: installed by an earlier version"
    if image.folder.parent.name == BUILDS and image.hash != image.folder.name:
        return f"it describes build {image.hash[:12]}, not {image.folder.name[:12]}"
    try:
        found = read_content_hash(image.folder)
    except ImageError as error:
        return error.message
    return "" if found == image.hash else f"changed: its SHA-256 is {found[:12]}, expected {image.hash[:12]}"


def _check_file(path: Path, expected: FileRecord) -> str:
    try:
        size, digest = hash_file(path)
    except ImageError:
        return "not a regular file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if size != expected.size:
        return f"changed: it has {size} bytes, expected {expected.size}"
    return "" if digest == expected.sha256 else f"changed: its SHA-256 is {digest[:12]}, expected {expected.sha256[:12]}"
