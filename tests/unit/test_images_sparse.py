"""Copies and hashes of files with holes."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.sparse import copy_hashed, hash_file, move_hashed, open_regular

MB = 1 << 20


def make(path: Path, *parts: bytes | int) -> Path:
    """Bytes are data, numbers are holes."""
    with path.open("wb") as file:
        for part in parts:
            if isinstance(part, int):
                file.seek(part, os.SEEK_CUR)
            else:
                file.write(part)
        file.truncate()
    return path


@pytest.mark.parametrize(
    "parts",
    [(), (b"x",), (MB,), (3 * MB + 5,), (b"a" * (MB + 1),), (b"a", MB, b"b"), (MB, b"b" * 5000, 2 * MB), (7 * MB, b"z")],
)
def test_copy_equals_its_source_and_the_hash_is_that_of_all_bytes(tmp_path: Path, parts: tuple[bytes | int, ...]) -> None:
    source, target = make(tmp_path / "source", *parts), tmp_path / "target"
    content = source.read_bytes()
    expected = (len(content), hashlib.sha256(content).hexdigest())
    assert copy_hashed(source, target) == hash_file(source) == hash_file(target) == expected
    assert target.read_bytes() == content


def test_holes_stay_holes_and_memory_is_bounded(tmp_path: Path) -> None:
    source = make(tmp_path / "source", b"x" * MB, 64 * MB, b"y" * MB, 64 * MB)
    if source.stat().st_blocks * 512 > 8 * MB:
        pytest.skip("this file system has no holes")
    tracemalloc.start()
    try:
        copy_hashed(source, tmp_path / "target")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MB
    target = (tmp_path / "target").stat()
    assert target.st_size == 130 * MB
    assert target.st_blocks * 512 <= 8 * MB


def test_existing_target_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "target").symlink_to(make(tmp_path / "precious", b"precious"))
    with pytest.raises(FileExistsError):
        copy_hashed(make(tmp_path / "source", b"new"), tmp_path / "target")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_moved_file_is_hashed_and_readable_by_all(tmp_path: Path) -> None:
    source = make(tmp_path / "source", b"x" * 5000, MB, b"y")
    source.chmod(0o600)
    expected, number = hash_file(source), source.stat().st_ino
    assert move_hashed(source, tmp_path / "target") == expected
    assert not source.exists()
    found = (tmp_path / "target").stat()
    assert (found.st_ino, found.st_mode & 0o777) == (number, 0o644)


@pytest.mark.parametrize("kind", ["symbolic link", "FIFO", "directory"])
@pytest.mark.parametrize("function", [copy_hashed, move_hashed])
def test_only_regular_files_are_taken(tmp_path: Path, function: Callable[[Path, Path], tuple[int, str]], kind: str) -> None:
    path = tmp_path / "source"
    match kind:
        case "symbolic link":
            path.symlink_to(make(tmp_path / "file", b"x"))
        case "FIFO":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with pytest.raises(ImageError, match=f"source is a {kind}, expected a regular file"):
        function(path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_link_is_followed_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(make(tmp_path / "file", b"content"))
    with open_regular(tmp_path / "link", follow=True) as descriptor:
        assert os.read(descriptor, 100) == b"content"
    with pytest.raises(ImageError, match="link is a symbolic link"), open_regular(tmp_path / "link"):
        pass
    (tmp_path / "device").symlink_to("/dev/null")
    with pytest.raises(ImageError, match="device is a character device"), open_regular(tmp_path / "device", follow=True):
        pass
