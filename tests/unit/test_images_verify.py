"""Comparing installed builds with their hashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.images.install import install_image
from orchestrator.images.store import find_build, find_image
from orchestrator.images.verify import verify
from orchestrator.model.plan import ImageRef
from tests.harness.images import make_build


def problems(store: Path) -> dict[str, str]:
    return {result.file: result.problem for result in verify(find_image(store, "one")) if result.problem}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    install_image(make_build(tmp_path / "built", disk=b"disk" * 1000), tmp_path / "store", "one")
    return tmp_path / "store"


def test_installed_build_is_verified(store: Path) -> None:
    assert [result.file for result in verify(find_image(store, "one"))] == ["image.json", "disk.raw", "initrd", "vmlinuz"]
    assert problems(store) == {}


@pytest.mark.parametrize("file", ["vmlinuz", "initrd", "disk.raw"])
def test_changed_byte_is_found(store: Path, file: str) -> None:
    path = store / "one" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert list(problems(store)) == [file]
    assert "its SHA-256 is" in problems(store)[file]


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "file", "text"),
    [
        (lambda folder: change_json(folder / "image.json", cmdline="init=/bin/sh"), "image.json", "changed: its SHA-256"),
        (lambda folder: change_json(folder / "image.json", hash="0" * 64), "image.json", "it describes build 000000000000"),
        (lambda folder: change_json(folder / "image.json", later=1), "image.json", "changed: its SHA-256"),
        (lambda folder: (folder / "extra").write_text(""), "extra", "not part of the build"),
        (lambda folder: (folder / ".hidden").symlink_to("/"), ".hidden", "not part of the build"),
    ],
)
def test_other_changes_are_found(store: Path, damage: Callable[[Path], object], file: str, text: str) -> None:
    damage((store / "one").resolve())
    assert list(problems(store)) == [file]
    assert text in problems(store)[file]


def test_file_that_was_changed_after_the_image_was_read_is_a_problem_of_this_file(store: Path) -> None:
    image = find_image(store, "one")
    (image.folder / "vmlinuz").unlink()
    (image.folder / "initrd").unlink()
    (image.folder / "initrd").symlink_to("vmlinuz")
    (image.folder / "disk.raw").write_bytes(b"")
    found = {result.file: result.problem for result in verify(image)}
    assert found == {
        "image.json": "",
        "disk.raw": "changed: it has 0 bytes, expected 4000",
        "initrd": "not a regular file",
        "vmlinuz": "cannot be read: No such file or directory",
    }


def test_build_without_hashes_does_not_pass(tmp_path: Path) -> None:
    make_build(tmp_path / "one")
    results = verify(find_image(tmp_path, "one"))
    assert [result.file for result in results] == ["image.json", "initrd", "vmlinuz"]
    assert all("no hash was recorded" in result.problem for result in results)


def test_earlier_build_is_verified_as_itself(store: Path, tmp_path: Path) -> None:
    old = find_image(store, "one")
    install_image(make_build(tmp_path / "again", "newer"), store, "one")
    assert not any(result.problem for result in verify(find_build(store, ImageRef("one", old.hash))))
