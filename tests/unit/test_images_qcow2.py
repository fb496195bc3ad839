"""The strict check of qcow2 images, on headers and tables made by hand."""

from __future__ import annotations

import os
import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.qcow2 import Qcow2, check_qcow2
from tests.harness.disk_images import MB, qcow2_header

CLUSTER = 1 << 16
LIMIT = 64 << 30


def check(tmp_path: Path, content: bytes, limit: int = LIMIT) -> Qcow2:
    file = tmp_path / "image"
    file.write_bytes(content)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return check_qcow2(descriptor, len(content), limit=limit)
    finally:
        os.close(descriptor)


def with_tables(*entries: int, size: int = MB) -> bytes:
    """An L2 table in the fourth cluster, and two clusters of data."""
    table = struct.pack(f">{len(entries)}Q", *entries).ljust(CLUSTER, b"\0")
    return qcow2_header(size, l1=(3 * CLUSTER,)) + bytes(CLUSTER) + table + bytes(2 * CLUSTER)


def test_empty_image_has_no_data(tmp_path: Path) -> None:
    assert check(tmp_path, qcow2_header(5 * MB)) == Qcow2(5 * MB, 0)


def test_allocated_clusters_are_counted(tmp_path: Path) -> None:
    assert check(tmp_path, with_tables(4 * CLUSTER, 0, 5 * CLUSTER | 1 << 63, 1)) == Qcow2(MB, 2 * CLUSTER)


def test_compressed_clusters_count_as_unpacked(tmp_path: Path) -> None:
    assert check(tmp_path, with_tables(*[1 << 62 | 4 * CLUSTER] * 16)).data == 16 * CLUSTER


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backing": 200, "backing_size": 11}, "backing file"),
        ({"backing_size": 11}, "backing file"),
        ({"crypt": 1}, "encrypted"),
        ({"crypt": 2}, "encrypted"),
        ({"snapshots": 1}, "1 internal snapshots"),
        ({"version": 1}, "version 1"),
        ({"version": 4}, "version 4"),
        ({"incompatible": 1}, "dirty"),
        ({"incompatible": 2}, "corrupt"),
        ({"incompatible": 4}, "external data file"),
        ({"incompatible": 16}, "extended L2"),
        ({"incompatible": 1 << 40}, "unknown feature 40"),
        ({"refcounts": 1 << 20}, "refcount table"),
        ({"l1_size": 0xFFFFFFFF}, "L1 table has 4294967295 entries"),
        ({"l1_size": 0}, "L1 table has 0 entries"),
        ({"l1_offset": 1 << 40}, "not inside the file"),
        ({"l1_offset": 100}, "not inside the file"),
        ({"length": 72}, "length 72"),
        ({"length": 1 << 30}, "length"),
    ],
)
def test_dangerous_header_is_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        check(tmp_path, qcow2_header(**changes))


@pytest.mark.parametrize("kind", [0xE2792ACA, 0x44415441, 0x0537BE77])
@pytest.mark.parametrize("version", [2, 3])
def test_dangerous_header_extension_is_refused(tmp_path: Path, kind: int, version: int) -> None:
    content = bytearray(qcow2_header(version=version))
    extensions = struct.pack(">II8sII", 0x6803F857, 8, b"", kind, 8)  # after a harmless one
    start = 72 if version == 2 else 104
    content[start : start + len(extensions)] = extensions
    with pytest.raises(ImageError, match=r"backing file format|external data file|encryption header"):
        check(tmp_path, bytes(content))


def test_endless_header_extension_is_refused(tmp_path: Path) -> None:
    content = bytearray(qcow2_header())
    content[104:112] = struct.pack(">II", 0x12345678, 0xFFFFFFF0)
    with pytest.raises(ImageError, match="longer than the header"):
        check(tmp_path, bytes(content))


@pytest.mark.parametrize("size", [0, LIMIT + 1, 1 << 62])
def test_size_beyond_the_limit_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ImageError, match=f"{size} bytes, the limit is {LIMIT}"):
        check(tmp_path, qcow2_header(size))


@pytest.mark.parametrize("bits", [0, 8, 22, 63])
def test_invalid_cluster_size_is_refused(tmp_path: Path, bits: int) -> None:
    content = bytearray(qcow2_header())
    content[20:24] = struct.pack(">I", bits)
    with pytest.raises(ImageError, match="cluster size"):
        check(tmp_path, bytes(content))


def test_tables_that_share_an_l2_table_are_refused(tmp_path: Path) -> None:
    size = 100 * CLUSTER * CLUSTER // 8
    content = qcow2_header(size, l1=(3 * CLUSTER,) * 100) + bytes(2 * CLUSTER)
    with pytest.raises(ImageError, match="more than once"):
        check(tmp_path, content)


def test_clusters_used_more_than_once_are_refused(tmp_path: Path) -> None:
    """A small file that unpacks to a large disk."""
    with pytest.raises(ImageError, match="more than once"):
        check(tmp_path, with_tables(*[4 * CLUSTER] * 16))


@pytest.mark.parametrize("cut", [0, 3, 50, 71, 100, CLUSTER, 2 * CLUSTER, 3 * CLUSTER, 5 * CLUSTER])
def test_truncated_image_is_refused(tmp_path: Path, cut: int) -> None:
    with pytest.raises(ImageError):
        check(tmp_path, with_tables(4 * CLUSTER, 5 * CLUSTER)[:cut])


def test_any_header_gives_a_result_or_a_clear_error(tmp_path: Path) -> None:
    dice = random.Random(1)
    for _ in range(500):
        content = bytearray(with_tables(4 * CLUSTER, 5 * CLUSTER))
        for _ in range(dice.randint(1, 4)):
            place = dice.choice((dice.randrange(4, 112), CLUSTER + dice.randrange(8), 3 * CLUSTER + dice.randrange(64)))
            content[place] = dice.randrange(256)
        with suppress(ImageError):
            assert check(tmp_path, bytes(content)).data <= LIMIT
