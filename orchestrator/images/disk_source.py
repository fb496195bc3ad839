"""Takes the image of a disk from a file of unknown origin: a private copy, or a conversion of it, as a sparse raw image."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Literal

from orchestrator.errors import ImageError
from orchestrator.images import sandbox
from orchestrator.images.cache import Progress
from orchestrator.images.description import DISK
from orchestrator.images.qcow2 import MAGIC, check_qcow2
from orchestrator.images.source_copy import Copied, check_space, copy_sparse, open_source, read_at
from orchestrator.images.sparse import hash_file, open_regular

Format = Literal["raw", "qcow2"]

_SOURCE = "source.qcow2"
_CONVERT = "convert it with `qemu-img convert -O qcow2`"

# Files that have to be changed first: magic number, what it is, how to change it
_CONTAINERS = (
    (b"\x1f\x8b", "compressed with gzip", "unpack it with `gunzip`"),
    (b"\xfd7zXZ\0", "compressed with xz", "unpack it with `unxz`"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with `unzstd`"),
    (b"BZh", "compressed with bzip2", "unpack it with `bunzip2`"),
    (b"PK\x03\x04", "a zip archive", "unpack it with `unzip`"),
    (b"KDMV", "a VMDK image", _CONVERT),
    (b"# Disk Desc", "a VMDK description", _CONVERT),
    (b"vhdxfile", "a VHDX image", _CONVERT),
    (b"conectix", "a VHD image", _CONVERT),
    (b"<<< ", "a VDI image", _CONVERT),
    (b"QED\0", "a QED image", _CONVERT),
)


def take_disk(
    folder: Path, file: Path, *, format: Format | None, sha256: str | None, limit: int, progress: Progress
) -> tuple[Copied, str]:
    """Fills ``disk.raw`` of the folder. Returns its size and hash, and a text about its source.

    Args:
        format: None: qcow2 if the file starts as one.
        sha256: what the file's hash must be; None: anything.
        limit: bytes of the file, and of the disk.
    """
    kind = format or detect_format(file)
    target = folder / DISK
    progress(f"copying {file.name}")
    copied = copy_sparse(file, folder / _SOURCE if kind == "qcow2" else target, limit=limit, progress=progress)
    if sha256 and copied.sha256 != sha256.lower():
        text = f"wrong SHA-256 of {file}: {copied.sha256}, expected {sha256.lower()}"
        raise ImageError(text, "fetch the image again, or correct --sha256")
    source = f"{file.name} ({kind}, sha256 {copied.sha256})"
    if kind == "qcow2":
        _convert(folder, limit, progress)
        progress("hashing the disk")
        return Copied(*hash_file(target)), source
    if copied.size % 512 or not copied.size:
        raise ImageError(f"{file} has {copied.size} bytes, not a multiple of 512 (truncated?)", "fetch the image again")
    target.chmod(0o644)
    return copied, source


def detect_format(path: Path) -> Format:
    """Safe for untrusted files: what starts as qcow2 is checked strictly, and raw images are only ever read as raw."""
    with open_source(path) as descriptor:
        start = read_at(descriptor, 0, 16)
    for magic, what, hint in _CONTAINERS:
        if start.startswith(magic):
            raise ImageError(f"{path} is {what}, expected a raw or qcow2 image", hint)
    return "qcow2" if start.startswith(MAGIC) else "raw"


def _convert(folder: Path, limit: int, progress: Progress) -> None:
    source, target = folder / _SOURCE, folder / DISK
    with open_regular(source) as descriptor:
        checked = check_qcow2(descriptor, os.fstat(descriptor).st_size, limit=limit)
    size = -(-checked.size // 512) * 512
    check_space(folder, checked.data)
    source.chmod(0o644)
    with target.open("xb") as file:
        file.truncate(size)
        os.fchown(file.fileno(), sandbox.USER, sandbox.USER)
        os.fchmod(file.fileno(), 0o600)
    # -n, --target-is-zero: the file exists, and is a hole; -U: no locks
    argv = ["qemu-img", "convert", "-U", "-n", "--target-is-zero", "-S", "64k", "-f", "qcow2", "-O", "raw"]
    limits = sandbox.Limits(seconds=300 + (checked.data >> 30) * 60, output=size)
    with _report_growth(target, checked.data, progress):
        done = sandbox.run_confined(folder, [*argv, f"/work/{_SOURCE}", f"/work/{DISK}"], limits=limits, writable=True)
    if done.status:
        lines = done.stderr.strip().splitlines()
        text = f"cannot convert the qcow2 image: {lines[-1][:300] if lines else f'qemu-img exited with status {done.status}'}"
        full = os.strerror(ENOSPC) in done.stderr
        raise ImageError(text, "free space in the store" if full else "check it with `qemu-img check`; fetch the image again")
    os.chown(target, 0, 0)
    target.chmod(0o644)
    source.unlink()


@contextmanager
def _report_growth(path: Path, total: int, progress: Progress) -> Iterator[None]:
    """Reports every two seconds how much of a file another program has written."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(2):
            progress(f"converting to a raw disk: {path.stat().st_blocks >> 11} of at most {total >> 20} MB")

    thread = threading.Thread(target=watch, name="convert", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
