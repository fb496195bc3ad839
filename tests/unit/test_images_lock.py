"""Locks of packages: their text, and the files that are kept for them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.lock import LockedPackage, find_kept, format_lock, keep_debs, parse_lock, read_lock

SHA = "0123456789abcdef" * 4
LINE = f"dbus=1.16.2-2 amd64 {SHA}"


def test_text_is_kept() -> None:
    text = f"{LINE}\nutil-linux=1:2.41.5-0+deb13u1~x amd64 {SHA}\n"
    assert format_lock(reversed(parse_lock(f"# comment\n\n{text}", source="l"))) == text


def test_file_name_is_that_of_apt() -> None:
    assert LockedPackage("mount", "1:2.41.5-0+b1", "amd64", SHA).file == "mount_1%3a2.41.5-0+b1_amd64.deb"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no packages"),
        ("# nothing\n", "names no packages"),
        (f"{LINE}\n{LINE}\n", "line 2: package dbus appears twice"),
        (LINE.replace("dbus", "../dbus"), "line 1"),
        (LINE.replace("1.16.2-2", "1/2"), "line 1"),
        (LINE.replace("amd64", "arm64"), "line 1"),
        (LINE[:-1], "line 1"),
        (LINE.upper(), "line 1"),
        (f"\n{LINE} more", "line 2"),
        ("\0" * 100, "line 1"),
    ],
)
def test_invalid_lock_names_the_line(text: str, message: str) -> None:
    with pytest.raises(ImageError, match=f"invalid lock file.lock: .*{message}"):
        parse_lock(text, source="file.lock")


def test_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot read the lock .*No such file"):
        read_lock(tmp_path / "none")
    with pytest.raises(ImageError, match="cannot read the lock .*directory"):
        read_lock(tmp_path)


def test_endless_file_is_an_error() -> None:
    with pytest.raises(ImageError, match="larger than"):
        read_lock(Path("/dev/zero"))


def test_only_the_locked_content_is_found(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    package = LockedPackage("a1", "1", "all", hashlib.sha256(b"right").hexdigest())
    for folder, content in ((old, b"wrong"), (new, b"right")):
        folder.mkdir()
        (folder / package.file).write_bytes(content)
    assert find_kept(package, [old]) is None
    assert find_kept(package, [old, new]) == new / package.file
    keep_debs([package], [old, new], tmp_path / "kept")
    assert (tmp_path / "kept" / package.file).read_bytes() == b"right"
