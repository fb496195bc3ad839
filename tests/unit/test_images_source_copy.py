"""Copies of files that may change, be no files at all, or be mostly holes."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.source_copy import check_space, copy_sparse

MB = 1 << 20


def nothing(_: str) -> None:
    pass


def write_sparse(file: Path, size: int = 64 * MB) -> Path:
    with file.open("wb") as target:
        target.write(b"start")
        target.seek(10 * MB + 5)
        target.write(b"middle")
        target.truncate(size)
    return file


@pytest.mark.parametrize("size", [64 * MB, 20 * MB + 3])
def test_copy_is_equal_hashed_and_sparse(tmp_path: Path, size: int) -> None:
    source = write_sparse(tmp_path / "source", size)
    copied = copy_sparse(source, tmp_path / "copy", limit=size, progress=nothing)
    assert (copied.size, copied.sha256) == (size, hashlib.sha256(source.read_bytes()).hexdigest())
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 <= 2 * MB


def test_blocks_of_zeros_become_holes(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(8 * MB) + b"end")
    copy_sparse(tmp_path / "source", tmp_path / "copy", limit=9 * MB, progress=nothing)
    assert (tmp_path / "copy").stat().st_blocks * 512 <= MB


def test_empty_file_is_copied(tmp_path: Path) -> None:
    (tmp_path / "source").touch()
    assert copy_sparse(tmp_path / "source", tmp_path / "copy", limit=1, progress=nothing).size == 0


def test_file_above_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"12345")
    with pytest.raises(ImageError, match="has 5 bytes, the limit is 4"):
        copy_sparse(tmp_path / "source", tmp_path / "copy", limit=4, progress=nothing)


@pytest.mark.parametrize("kind", ["FIFO", "directory", "socket", "character device"])
def test_other_kind_of_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "source"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path = Path("/dev/zero")
    with pytest.raises(ImageError, match=f"is a {kind}, expected a regular file"):
        copy_sparse(path, tmp_path / "copy", limit=MB, progress=nothing)


@pytest.mark.parametrize("name", ["missing", "nul\0"])
def test_missing_file_is_reported(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="cannot read"):
        copy_sparse(tmp_path / name, tmp_path / "copy", limit=MB, progress=nothing)


@pytest.mark.parametrize("change", ["shrinks", "grows", "is written"])
def test_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * (4 * MB))
    os.utime(source, (1, 1))  # the kernel's times are some ms coarse
    read = os.pread

    def change_first(descriptor: int, length: int, offset: int) -> bytes:
        if offset == MB:
            if change == "is written":
                with source.open("r+b") as file:
                    file.write(b"y")
            else:
                os.truncate(source, MB if change == "shrinks" else 5 * MB)
        return read(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", change_first)
    with pytest.raises(ImageError, match="changed while it was read"):
        copy_sparse(source, tmp_path / "copy", limit=8 * MB, progress=nothing)


def test_missing_space_is_reported_before_the_copy(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no space in .*MB are needed"):
        check_space(tmp_path, 1 << 60)
    check_space(tmp_path, 1)


def test_full_file_system_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    (tmp_path / "source").write_bytes(b"x" * MB)
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(ImageError, match="No space left on device") as error:
        copy_sparse(tmp_path / "source", tmp_path / "copy", limit=MB, progress=nothing)
    assert "--output" in error.value.hint
