"""Strict check of a qcow2 image before any program opens it. Source: docs/interop/qcow2.rst of QEMU.

Refused: everything that names another file (backing file, external data file), that needs a key, or that makes a small file large
in memory or on disk. What is left is a disk in one file.
"""

from __future__ import annotations

import array
import struct
import sys
from dataclasses import dataclass

from orchestrator.errors import ImageError
from orchestrator.images.source_copy import read_at

MAGIC = b"QFI\xfb"

_MAX_L1 = 4 << 20  # entries: 32 MB, QEMU's own limit
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_RESERVED_L1 = ~(1 << 63 | _OFFSET) & (1 << 64) - 1
_COMPRESSED, _COPIED, _ZERO = 1 << 62, 1 << 63, 1
_INCOMPATIBLE = {
    0: "it is marked dirty",
    1: "it is marked corrupt",
    2: "it has an external data file",
    4: "it has extended L2 tables",
}
_COMPRESSION_BIT = 1 << 3
_EXTENSIONS = {0xE2792ACA: "a backing file format", 0x44415441: "an external data file", 0x0537BE77: "an encryption header"}


@dataclass(frozen=True)
class Qcow2:
    size: int  # bytes of the disk that the guest sees
    data: int  # bytes that conversion writes at most


def check_qcow2(descriptor: int, file_size: int, *, limit: int) -> Qcow2:
    """Raises ImageError if the image is not a plain qcow2 disk of at most ``limit`` bytes."""
    header = read_at(descriptor, 0, 112)
    if len(header) < 72 or header[:4] != MAGIC:
        raise _refuse("the qcow2 header is missing or truncated")
    (version, backing, backing_size, bits, size, crypt, l1_size, l1_offset, _, refcount_clusters, snapshots, _) = struct.unpack(
        ">IQIIQIIQQIIQ", header[4:72]
    )
    if version not in (2, 3):
        raise _refuse(f"qcow2 version {version} is not supported")
    if not 9 <= bits <= 21:
        raise _refuse(f"its cluster size 2^{bits} is invalid")
    if backing or backing_size:
        raise _refuse("it has a backing file")
    if crypt:
        raise _refuse("it is encrypted")
    if snapshots:
        raise _refuse(f"it has {snapshots} internal snapshots")
    if not 0 < size <= limit:
        text = f"cannot import the image: its disk has {size} bytes, the limit is {limit}"
        raise ImageError(text, "give a higher --max-size, or shrink the disk")
    _check_features(descriptor, header, version, 1 << bits)
    if refcount_clusters << bits > 8 << 20:
        raise _refuse(f"its refcount table has {refcount_clusters} clusters")
    needed = -(-size // (1 << 2 * bits - 3))  # each L2 table maps 2^(bits-3) clusters
    if l1_size > _MAX_L1 or not needed <= l1_size <= needed + (1 << bits - 3):
        raise _refuse(f"its L1 table has {l1_size} entries, expected {needed}")
    if l1_offset & (1 << bits) - 1 or l1_offset + 8 * l1_size > file_size:
        raise _refuse("its L1 table is not inside the file (truncated?)")
    return Qcow2(size, min(size, _count_data(descriptor, file_size, bits, l1_offset, needed)))


def _check_features(descriptor: int, header: bytes, version: int, cluster: int) -> None:
    if version == 2:
        return _check_extensions(read_at(descriptor, 72, cluster - 72))
    if len(header) < 104:
        raise _refuse("the qcow2 header is truncated")
    incompatible, _, _, _, length = struct.unpack(">QQQII", header[72:104])
    for bit in range(64):
        if incompatible >> bit & 1 and 1 << bit != _COMPRESSION_BIT:
            raise _refuse(_INCOMPATIBLE.get(bit, f"it has the unknown feature {bit}"))
    if not 104 <= length <= cluster or length % 8:
        raise _refuse(f"its header has the invalid length {length}")
    _check_extensions(read_at(descriptor, length, cluster - length))


def _check_extensions(area: bytes) -> None:
    offset = 0
    while offset + 8 <= len(area):
        kind, length = struct.unpack(">II", area[offset : offset + 8])
        if not kind:
            return
        if kind in _EXTENSIONS:
            raise _refuse(f"it has {_EXTENSIONS[kind]}")
        offset += 8 + (length + 7 & ~7)
    if offset > len(area):
        raise _refuse("a header extension is longer than the header")


def _count_data(descriptor: int, file_size: int, bits: int, l1_offset: int, entries: int) -> int:
    """Bytes of all allocated clusters, which must be in the file. Stops as soon as there are more than the file can hold: shared
    tables and clusters would make a small file large, and this pass long.
    """
    cluster = 1 << bits
    limit = file_size // cluster + 1
    tables = plain = packed = 0
    for start in range(0, entries, 1 << 16):
        for entry in _read_table(descriptor, l1_offset + 8 * start, min(1 << 16, entries - start)):
            if not entry:
                continue
            table = entry & _OFFSET
            if entry & _RESERVED_L1 or table & cluster - 1 or not cluster <= table <= file_size - cluster:
                raise _refuse("an L2 table is not inside the file (truncated?)")
            tables += 1
            if tables + plain > limit:
                raise _refuse("its clusters are used more than once")
            found = _read_table(descriptor, table, cluster >> 3)
            ordinary = [word for word in found if word and not word & _COMPRESSED]
            compressed = [word for word in found if word & _COMPRESSED]
            packed += len(compressed)
            if any(_last_sector(word, bits) >= file_size for word in compressed):
                raise _refuse("a compressed cluster is not inside the file (truncated?)")
            offsets = [word & _OFFSET for word in ordinary if not word & _ZERO and word & _OFFSET]
            if any(offset & cluster - 1 or offset >= file_size for offset in offsets):
                raise _refuse("a data cluster is not inside the file (truncated?)")
            plain += len(offsets)
    if tables + plain > limit:
        raise _refuse("its clusters are used more than once")
    return (plain + packed) * cluster


def _last_sector(word: int, bits: int) -> int:
    """Offset of the last sector of a compressed cluster in the file, of which QEMU would read zeros if it is missing. Only that
    sector may be incomplete (qcow2 specification, compressed clusters descriptor).
    """
    width = 62 - (bits - 8)
    start, sectors = word & (1 << width) - 1, word >> width & (1 << bits - 8) - 1
    return (start // 512 + sectors) * 512


def _read_table(descriptor: int, offset: int, entries: int) -> array.array[int]:
    words = array.array("Q", read_at(descriptor, offset, 8 * entries).ljust(8 * entries, b"\0"))
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _refuse(reason: str) -> ImageError:
    return ImageError(
        f"cannot import the qcow2 image: {reason}",
        "write it anew where it was made: `qemu-img convert -O qcow2 OLD NEW`",
    )
