"""Files of emulated disks: whole or not at all, never over another file."""

from __future__ import annotations

import hashlib
import os
from errno import ENOSPC
from pathlib import Path

import pytest

from orchestrator.errors import Conflict, HostError, ImageError
from orchestrator.host.block import BlockProgress
from orchestrator.host.disk_files import check_absent, copy_image, create_file, remove_file


def ignore(_: BlockProgress) -> None: ...


def test_file_is_allocated_and_for_root_only(tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    create_file(file, 1 << 20)
    found = file.stat()
    assert (found.st_size, found.st_mode & 0o777) == (1 << 20, 0o600)
    assert found.st_blocks * 512 >= 1 << 20, "a sparse file can stop the guest when the host's disk is full"
    assert not any(file.read_bytes())


def test_existing_file_is_never_replaced(tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.write_text("data")
    with pytest.raises(Conflict, match="exists already"):
        check_absent(file)
    with pytest.raises(HostError, match="cannot create file .*File exists"):
        create_file(file, 1 << 20)
    assert file.read_text() == "data"


def test_link_is_never_followed(tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Conflict, match="exists already"):
        check_absent(file)
    with pytest.raises(HostError):
        create_file(file, 1 << 20)
    assert not (tmp_path / "elsewhere").exists()


def test_missing_folder_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=f"folder {tmp_path}/none does not exist"):
        check_absent(tmp_path / "none" / "disk.raw")


def test_full_file_system_is_an_error_with_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(HostError, match="of 1048576 bytes: No space left on device") as caught:
        create_file(tmp_path / "disk.raw", 1 << 20)
    assert caught.value.hint == f"check free space with `df {tmp_path}`"


@pytest.mark.parametrize("size", [1, 4096, (1 << 20) - 1, 1 << 20, (2 << 20) + 7])
def test_image_is_copied_byte_by_byte(tmp_path: Path, size: int) -> None:
    image, file = tmp_path / "image", tmp_path / "disk.raw"
    data = (os.urandom(size // 2) + bytes(size))[:size]
    image.write_bytes(data)
    create_file(file, 4 << 20)
    seen: list[int] = []
    copy_image(file, image, lambda now: seen.append(now.done), hashlib.sha256(data).hexdigest())
    assert file.read_bytes() == data.ljust(4 << 20, b"\0")
    assert seen[-1] == size


def test_image_with_another_hash_is_refused(tmp_path: Path) -> None:
    image, file = tmp_path / "image", tmp_path / "disk.raw"
    image.write_bytes(b"data")
    create_file(file, 1 << 20)
    with pytest.raises(ImageError, match=f"expected {'0' * 64}"):
        copy_image(file, image, ignore, "0" * 64)


def test_removed_file_may_be_removed_again(tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    create_file(file, 4096)
    remove_file(file)
    remove_file(file)
    remove_file(tmp_path / "none" / "disk.raw")
    assert list(tmp_path.iterdir()) == []
