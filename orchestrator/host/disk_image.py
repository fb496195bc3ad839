"""Writes a disk image to a block device, and compares every byte of it after it was written."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import HostError, ImageError
from orchestrator.host.block import CHUNK, BlockProgress, Report, claim_device, is_zero, read_at, read_size, sync, write_at
from orchestrator.host.root import HostRoot


def write_image(
    host: HostRoot, device: str, image: Path, report: Report, *, blank: bool = False, sha256: str | None = None
) -> None:
    """Writes a raw image to the start of a device that the host does not use, and reads it back, bypassing the page cache.

    `report` is called after each piece, and an exception of it ends the work.

    Args:
        blank: the device was read and contains only zeros; zeros of the image are then not written, but they are compared.
        sha256: of the image, in hexadecimal; checked over the bytes that were written.

    Raises:
        ImageError: the image is larger than the device, changes while it is read, or its hash differs.
        HostError: the host uses the device (EBUSY), or the device does not return what was written.
    """
    with _open_image(image) as file, claim_device(host, device) as descriptor, mmap.mmap(-1, CHUNK) as buffer:
        length = os.fstat(file.fileno()).st_size
        size, block_size = read_size(host, device)
        if length > size.bytes:
            what = f"image {image} of {length} bytes is larger than {device} of {size.bytes} bytes"
            raise ImageError(what, "use a larger disk or a smaller image")
        with memoryview(buffer) as view:
            digest = hashlib.sha256() if sha256 else None
            for start, data in _read_pieces(file, image, length, view, block_size):
                if digest:
                    digest.update(data[: length - start])
                if not blank or not is_zero(data):
                    write_at(descriptor, data, start, device)
                report(BlockProgress(device, "write", min(start + len(data), length), length))
            sync(descriptor, device)
            if digest and digest.hexdigest() != sha256:
                what = f"image {image}: sha256 {digest.hexdigest()}, expected {sha256}"
                raise ImageError(what, "build or import the image again")
            _verify(descriptor, device, file, image, length, block_size, report)


def _verify(descriptor: int, device: str, file: BinaryIO, image: Path, length: int, block_size: int, report: Report) -> None:
    # bytearray compares in C, by memcmp(3); memoryview item by item.
    source = bytearray(CHUNK)
    with mmap.mmap(-1, CHUNK) as buffer, memoryview(buffer) as written, memoryview(source) as view:
        for start, data in _read_pieces(file, image, length, view, block_size):
            with written[: len(data)] as piece:
                read_at(descriptor, piece, start, device)
                if (source if len(data) == CHUNK else source[: len(data)]) != piece:
                    offset = start + next(index for index, byte in enumerate(source) if byte != piece[index])
                    what = f"{device} does not return what was written: the byte at offset {offset} differs from {image}"
                    raise HostError(what, "replace the disk")
            report(BlockProgress(device, "verify", min(start + len(data), length), length))


def _read_pieces(file: BinaryIO, image: Path, length: int, view: memoryview, block_size: int) -> Iterator[tuple[int, memoryview]]:
    """Offset and bytes of each piece, which is valid until the next one. The last is filled with zeros to a whole block."""
    for start in range(0, length, CHUNK):
        count = min(CHUNK, length - start)
        with view[:count] as piece:
            try:
                got = os.preadv(file.fileno(), [piece], start)
            except OSError as error:
                raise ImageError(f"cannot read image {image} at offset {start}: {error.strerror}") from None
        if got != count:
            raise ImageError(f"image {image} was changed while it was read: it ends at {start + got}, expected {length}")
        whole = -(-count // block_size) * block_size
        view[count:whole] = bytes(whole - count)
        with view[:whole] as piece:
            yield start, piece


@contextmanager
def _open_image(image: Path) -> Iterator[BinaryIO]:
    try:
        file = open(image, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ImageError(f"cannot open image {image}: {error.strerror}", "check `nohype image list`") from None
    with file:
        yield file
