"""Partition tables: read as Linux reads them, and refused if they contradict themselves."""

from __future__ import annotations

import os
import random
import struct
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.partitions import Layout, read_layout

SECTORS = 4096
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4").bytes_le


def read(tmp_path: Path, content: bytes) -> Layout:
    file = tmp_path / "disk"
    file.write_bytes(content)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return read_layout(descriptor, len(content))
    finally:
        os.close(descriptor)


def table(*entries: tuple[int, int, int], code: bytes = b"") -> bytes:
    """An MBR, or a table of an extended partition: type, first sector, number of sectors."""
    words = b"".join(struct.pack("<4xB3xII", *entry) for entry in entries)
    return code.ljust(440, b"\0") + b"\x44\x33\x22\x11\0\0" + words.ljust(64, b"\0") + b"\x55\xaa"


def mbr(*entries: tuple[int, int, int], more: dict[int, bytes] | None = None) -> bytes:
    disk = bytearray(SECTORS * 512)
    disk[:512] = table(*entries)
    for sector, content in (more or {}).items():
        disk[sector * 512 : sector * 512 + len(content)] = content
    return bytes(disk)


def gpt(parts: Sequence[tuple[int, int]], *, count: int = 128, current: int = 1, entry_size: int = 128, at: int = 2) -> bytes:
    """First and last sectors of the partitions; right checksums."""
    disk = bytearray(mbr((0xEE, 1, SECTORS - 1)))
    entries = bytearray(count * entry_size)
    for index, (first, last) in enumerate(parts):
        entry = struct.pack("<16s16sQQ", LINUX, uuid.UUID(int=index + 1).bytes_le, first, last)
        entries[index * entry_size : index * entry_size + 48] = entry
    disk[1024 : 1024 + len(entries)] = entries
    header = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, current, SECTORS - 1, 34, SECTORS - 34,
                                   bytes(16), at, count, entry_size, zlib.crc32(entries)))  # fmt: skip
    header[16:20] = struct.pack("<I", zlib.crc32(header))
    disk[512:604] = header
    return bytes(disk[: SECTORS * 512])


def test_gpt_is_read(tmp_path: Path) -> None:
    layout = read(tmp_path, gpt([(64, 127), (128, 1023)]))
    assert [(volume.number, volume.start, volume.size) for volume in layout.volumes] == [
        (1, 64 * 512, 64 * 512),
        (2, 65536, 458752),
    ]
    assert layout.volumes[1].partuuid == str(uuid.UUID(int=2))
    assert (layout.table, layout.bios_code) == ("GPT", False)


def test_mbr_with_logical_partitions_is_read(tmp_path: Path) -> None:
    chain = {1000: table((0x83, 8, 92), (5, 100, 100)), 1100: table((0x83, 8, 50))}
    layout = read(tmp_path, mbr((0x83, 64, 100), (5, 1000, 500), more=chain))
    assert [(volume.number, volume.start // 512) for volume in layout.volumes] == [(1, 64), (5, 1008), (6, 1108)]
    assert layout.volumes[2].partuuid == "11223344-06"  # as blkid prints it


def test_boot_code_is_seen(tmp_path: Path) -> None:
    disk = bytearray(mbr((0x83, 64, 100)))
    assert not read(tmp_path, bytes(disk)).bios_code
    disk[:3] = b"\xeb\x63\x90"
    assert read(tmp_path, bytes(disk)).bios_code


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gpt([(64, 63)]), "ends before it starts"),
        (gpt([(64, 127), (100, 200)]), "partition 2 overlaps partition 1"),
        (gpt([(0, 127)]), "overlaps the table"),
        (gpt([(64, SECTORS)]), "ends after the disk"),
        (gpt([(64, 1 << 62)]), "ends after the disk"),
        (gpt([(64, 127)], current=7), "invalid values"),
        (gpt([(64, 127)], entry_size=384), "invalid values"),
        (gpt([(64, 127)], at=1 << 50), "checksum of its entries"),
        (mbr((0xEE, 1, SECTORS)), "its header is missing"),
        (mbr((0x83, 64, 100), (0x83, 100, 100)), "overlaps"),
        (mbr((0x83, 64, SECTORS)), "ends after the disk"),
        (mbr((0x83, 0, 100)), "overlaps the table"),
        (mbr((5, 1000, 500), more={1000: table((0x83, 8, 8), (5, 0, 100))}), "endless"),
        (mbr((5, 1000, 500), more={1000: table((5, 100, 100)), 1100: table((5, 0, 100))}), "endless"),
        (mbr((5, 1000, 500), more={1000: table((0x83, 8, 8), (5, 600, 100))}), "leaves the extended partition"),
        (mbr((5, 1000, 500)), "is missing"),
        (mbr((5, 1 << 31, 500)), "is missing"),
        (mbr((5, 1000, 2000), more={1000 + 20 * i: table((5, 20 * (i + 1), 20)) for i in range(90)}), "endless"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictory_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read(tmp_path, content)


def test_table_for_large_sectors_is_named(tmp_path: Path) -> None:
    disk = bytearray(mbr((0xEE, 1, SECTORS)))
    disk[4096:4104] = b"EFI PART"
    with pytest.raises(ImageError, match="sectors of 4096 bytes"):
        read(tmp_path, bytes(disk))


@pytest.mark.parametrize("place", [512 + 8, 512 + 24, 512 + 72, 1024, 1024 + 40])
def test_changed_gpt_has_a_wrong_checksum(tmp_path: Path, place: int) -> None:
    disk = bytearray(gpt([(64, 127)]))
    disk[place] ^= 1
    with pytest.raises(ImageError, match="checksum"):
        read(tmp_path, bytes(disk))


@pytest.mark.parametrize(
    ("offset", "magic", "kind"),
    [
        (0, b"XFSB", "xfs"), (0x10040, b"_BHRfS_M", "btrfs"), (0x200, b"LABELONE" + bytes(16) + b"LVM2 001", "LVM"),
        (0, b"LUKS\xba\xbe", "LUKS"), (0xFF6, b"SWAPSPACE2", "swap"),
    ],
)  # fmt: skip
def test_content_of_a_partition_is_named(tmp_path: Path, offset: int, magic: bytes, kind: str) -> None:
    disk = bytearray(gpt([(64, 1023)]))
    disk[64 * 512 + offset : 64 * 512 + offset + len(magic)] = magic
    assert read(tmp_path, bytes(disk)).volumes[0].kind == kind


@pytest.mark.parametrize("content", [b"", b"hello", bytes(1 << 20), b"\x7fELF" + bytes(1 << 20)])
def test_unknown_content_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ImageError, match="neither a partition table nor a known file system"):
        read(tmp_path, content)


def test_any_table_gives_a_layout_or_a_clear_error(tmp_path: Path) -> None:
    dice = random.Random(1)
    chain = {1000: table((0x83, 8, 92), (5, 100, 100)), 1100: table((0x83, 8, 50))}
    base = mbr((0x83, 64, 100), (5, 1000, 500), more=chain)
    for _ in range(300):
        disk = bytearray(base)
        for _ in range(dice.randint(1, 5)):
            disk[dice.choice((0, 1000, 1100)) * 512 + dice.randrange(440, 512)] = dice.randrange(256)
        with suppress(ImageError):
            assert all(volume.start + volume.size <= len(disk) for volume in read(tmp_path, bytes(disk)).volumes)
