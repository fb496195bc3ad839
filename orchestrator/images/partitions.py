"""Partition tables and file system signatures of a raw disk image, read without any program.

Sources: UEFI 2.10, chapter 5 (GPT); the MBR as Linux reads it (block/partitions/msdos.c); the superblocks of the file systems. A
table that contradicts itself is refused, because a guest could read it differently than this module.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.errors import ImageError
from orchestrator.images.source_copy import read_at

_SECTOR = 512
_MAX_LOGICAL = 60  # partitions in an extended one, as many as Linux reads
_MAX_GPT = 1024  # entries
_EXTENDED = {0x05, 0x0F, 0x85}
_PROTECTIVE = 0xEE

# offset in the volume, magic number, name
_SIGNATURES = (
    (0, b"XFSB", "xfs"), (0x10040, b"_BHRfS_M", "btrfs"), (0x218, b"LVM2 001", "LVM"), (0x18, b"LVM2 001", "LVM"),
    (0, b"LUKS\xba\xbe", "LUKS"), (0xFF6, b"SWAPSPACE2", "swap"), (0x438, b"\x53\xef", "ext4"), (0, b"hsqs", "squashfs"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"), (0x400, b"\xe2\xe1\xf5\xe0", "erofs"), (0x8001, b"CD001", "iso9660"),
    (3, b"NTFS    ", "ntfs"), (0x1000, b"\xfc\x4e\x2b\xa9", "RAID"), (0, b"\xfc\x4e\x2b\xa9", "RAID"), (0x36, b"FAT", "fat"),
    (0x52, b"FAT32", "fat"),
)  # fmt: skip


@dataclass(frozen=True)
class Volume:
    """A partition, or the whole disk."""

    number: int  # as Linux counts; 0 is the whole disk
    start: int  # bytes
    size: int
    kind: str = ""  # file system or other content; empty: unknown
    uuid: str = ""  # of the file system; empty: none
    partuuid: str = ""  # as Linux's root=PARTUUID= expects it

    @property
    def name(self) -> str:
        return f"partition {self.number}" if self.number else "the whole disk"


@dataclass(frozen=True)
class Layout:
    table: str  # "GPT", "MBR", or empty for a file system on the whole disk
    volumes: tuple[Volume, ...]
    bios_code: bool  # the first sector has boot code that a BIOS starts

    def __str__(self) -> str:
        kinds = ", ".join(f"{volume.name} {volume.kind or 'unknown'}" for volume in self.volumes[:16])
        return f"{self.table}: {kinds or 'no partitions'}" if self.table else f"no partitions, {self.volumes[0].kind}"


def read_layout(descriptor: int, size: int) -> Layout:
    """Raises ImageError if the partition table is damaged, or there is neither a table nor a known file system."""
    first = read_at(descriptor, 0, _SECTOR)
    bootable = first[510:512] == b"\x55\xaa" and any(first[:440])
    whole = _identify(descriptor, Volume(0, 0, size))
    if whole.kind:
        return Layout("", (whole,), bios_code=bootable)
    if first[510:512] == b"\x55\xaa":
        entries = _parse_entries(first)
        if any(kind == _PROTECTIVE for kind, _, _ in entries):
            table, found = "GPT", _read_gpt(descriptor, size)
        else:
            table, found = "MBR", _read_mbr(descriptor, first)
        _check_ranges(found, size)
        return Layout(table, tuple(_identify(descriptor, volume) for volume in found), bios_code=bootable)
    raise ImageError(
        "cannot import the image: it has neither a partition table nor a known file system",
        "check the file and --format; give a raw or qcow2 image of a disk",
    )


def _read_gpt(descriptor: int, size: int) -> list[Volume]:
    header = read_at(descriptor, _SECTOR, _SECTOR)
    if header[:8] != b"EFI PART":
        if read_at(descriptor, 4096, 8) == b"EFI PART":
            raise _damaged("GPT", "it is made for sectors of 4096 bytes, expected 512")
        raise _damaged("GPT", "its header is missing")
    _, length, checksum, _, current = struct.unpack("<IIIIQ", header[8:32])
    table, count, entry_size, table_checksum = struct.unpack("<QIII", header[72:92])
    if not 92 <= length <= _SECTOR or zlib.crc32(header[:16] + bytes(4) + header[20:length]) != checksum:
        raise _damaged("GPT", "the checksum of its header is wrong")
    if current != 1 or table < 2 or not 0 < count <= _MAX_GPT or entry_size not in (128, 256, 512):
        raise _damaged("GPT", "its header has invalid values")
    entries = read_at(descriptor, table * _SECTOR, count * entry_size) if table * _SECTOR < size else b""
    if len(entries) != count * entry_size or zlib.crc32(entries) != table_checksum:
        raise _damaged("GPT", "the checksum of its entries is wrong")
    volumes = []
    for index in range(count):
        kind, unique, start, last = struct.unpack("<16s16sQQ", entries[index * entry_size : index * entry_size + 48])
        if any(kind):
            if last < start:
                raise _damaged("GPT", f"partition {index + 1} ends before it starts")
            partuuid = str(uuid.UUID(bytes_le=unique))
            volumes.append(Volume(index + 1, start * _SECTOR, (last - start + 1) * _SECTOR, partuuid=partuuid))
    return volumes


def _read_mbr(descriptor: int, first: bytes) -> list[Volume]:
    disk = struct.unpack("<I", first[440:444])[0]
    volumes = []
    for index, (kind, start, length) in enumerate(_parse_entries(first), 1):
        if kind in _EXTENDED and length:
            volumes += _read_logical(descriptor, disk, start, length)
        elif kind and length:
            volumes.append(_mbr_volume(disk, index, start, length))
    return sorted(volumes, key=lambda volume: volume.number)


def _read_logical(descriptor: int, disk: int, base: int, length: int) -> list[Volume]:
    """A chain of tables: each has a partition, and the place of the next table, relative to the extended partition."""
    volumes: list[Volume] = []
    place, seen = base, set[int]()
    while True:
        if place in seen or len(seen) >= _MAX_LOGICAL or not base <= place < base + length:
            raise _damaged("MBR", "the chain of logical partitions is endless or leaves the extended partition")
        seen.add(place)
        sector = read_at(descriptor, place * _SECTOR, _SECTOR)
        if sector[510:512] != b"\x55\xaa":
            raise _damaged("MBR", "a table of a logical partition is missing")
        following = None
        for kind, start, count in _parse_entries(sector):
            if kind in _EXTENDED and count:
                following = base + start
            elif kind and count:
                volumes.append(_mbr_volume(disk, 5 + len(volumes), place + start, count))
        if following is None:
            return volumes
        place = following


def _mbr_volume(disk: int, number: int, start: int, length: int) -> Volume:
    partuuid = f"{disk:08x}-{number:02x}" if disk else ""
    return Volume(number, start * _SECTOR, length * _SECTOR, partuuid=partuuid)


def _parse_entries(sector: bytes) -> list[tuple[int, int, int]]:
    """Type, first sector and number of sectors of the four entries."""
    return [struct.unpack("<4xB3xII", sector[at : at + 16]) for at in range(446, 510, 16)]


def _check_ranges(volumes: Sequence[Volume], size: int) -> None:
    end, before = _SECTOR, None
    for volume in sorted(volumes, key=lambda volume: volume.start):
        if volume.start + volume.size > size:
            raise _damaged("partition table", f"{volume.name} ends after the disk (image truncated?)")
        if volume.start < end:
            raise _damaged("partition table", f"{volume.name} overlaps {before.name if before else 'the table'}")
        end, before = volume.start + volume.size, volume


def _identify(descriptor: int, volume: Volume) -> Volume:
    for offset, magic, kind in _SIGNATURES:
        if volume.size >= offset + len(magic) and read_at(descriptor, volume.start + offset, len(magic)) == magic:
            if kind == "fat" and not _is_fat(read_at(descriptor, volume.start, _SECTOR)):
                continue
            return replace(volume, kind=kind, uuid=_read_ext4(descriptor, volume) if kind == "ext4" else "")
    return volume


def _read_ext4(descriptor: int, volume: Volume) -> str:
    """The UUID of the file system, whose size must fit."""
    block = read_at(descriptor, volume.start + 0x400, 0x78)
    blocks, shift = struct.unpack("<I", block[4:8])[0], struct.unpack("<I", block[0x18:0x1C])[0]
    if shift > 6 or blocks << (10 + shift) > volume.size:
        raise _damaged("ext4", f"the file system is larger than {volume.name} (image truncated?)")
    return str(uuid.UUID(bytes=block[0x68:])) if any(block[0x68:]) else ""


def _is_fat(sector: bytes) -> bool:
    bytes_per_sector, per_cluster = struct.unpack("<HB", sector[11:14])
    return sector[510:512] == b"\x55\xaa" and bytes_per_sector in (512, 1024, 2048, 4096) and per_cluster.bit_count() == 1


def _damaged(table: str, reason: str) -> ImageError:
    return ImageError(f"cannot import the image: damaged {table}: {reason}", "check the file; fetch or create the image again")
