"""The store of built images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ImageError, NotFound
from orchestrator.images.description import Description, write_description
from orchestrator.images.install import install_image
from orchestrator.images.store import find_image, image_names, list_images
from orchestrator.values import Size


def build(folder: Path, kernel: str = "kernel") -> Path:
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_text(kernel)
    (folder / "initrd").write_text("initrd")
    texts = {"kernel_version": "6.12", "hash": "abc", "description": "d", "cmdline": "quiet", "console": "nohype-1"}
    write_description(folder, Description(memory=Size.parse("96M"), **texts))
    return folder


def test_installed_image_is_found(tmp_path: Path) -> None:
    store = tmp_path / "store"
    install_image(build(tmp_path / "built"), store, "one")
    image = find_image(store, "one")
    assert (image.name, image.cmdline, str(image.memory)) == ("one", "quiet", "96M")
    assert (image.console, image.kernel_version) == ("nohype-1", "6.12")
    assert image.kernel.read_text() == "kernel"
    assert list_images(store) == ((image,), ())


def test_installing_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    store = tmp_path / "store"
    install_image(build(tmp_path / "built"), store, "one")
    assert install_image(build(tmp_path / "again", "newer"), store, "one").kernel.read_text() == "newer"
    assert sorted(path.name for path in store.iterdir()) == [".builds", ".lock", "one"]


def test_leftover_of_a_crash_is_ignored_and_removed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    build(store / ".tmp-crashed" / "one")
    with pytest.raises(NotFound):
        find_image(store, "one")
    install_image(build(tmp_path / "built"), store, "two")
    assert sorted(path.name for path in store.iterdir()) == [".builds", ".lock", "two"]


def test_unknown_image_lists_the_available_ones(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="available: none") as error:
        find_image(tmp_path / "nowhere", "one")
    assert "nohype image build one" in error.value.hint
    build(tmp_path / "two")
    with pytest.raises(NotFound, match="available: two"):
        find_image(tmp_path, "one")


@pytest.mark.parametrize("name", ["..", ".", "", "two/../two"])
def test_path_as_name_is_not_found(tmp_path: Path, name: str) -> None:
    build(tmp_path / "two")
    with pytest.raises(NotFound):
        find_image(tmp_path, name)


@pytest.mark.parametrize("damage", ["vmlinuz", "initrd", "image.json"])
def test_damaged_image_is_an_error(tmp_path: Path, damage: str) -> None:
    folder = build(tmp_path / "one")
    (folder / damage).unlink()
    with pytest.raises(ImageError, match="damaged.*"):
        find_image(tmp_path, "one")


def test_description_with_invalid_json_is_an_error(tmp_path: Path) -> None:
    (build(tmp_path / "one") / "image.json").write_text("{")
    with pytest.raises(ImageError, match="damaged"):
        find_image(tmp_path, "one")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cmdline": ["a"]}, "cmdline: "),
        ({"cmdline": 5}, "cmdline: "),
        ({"cmdline": None}, "cmdline: "),
        ({"cmdline": "a\nb"}, "cmdline: only printable ASCII"),
        ({"cmdline": "\ud800"}, "cmdline: |Invalid JSON"),
        ({"cmdline": "x" * 4096}, "cmdline: "),
        ({"memory": 96}, "memory: "),
        ({"memory": "much"}, "memory: 'much' is not a size"),
        ({"memory": "9" * 5000}, "memory: "),
        ({"console": {}}, "console: "),
        ({"console": "a\u001b[31m"}, "console: "),
        ({"kernel_version": [[]]}, "kernel_version: "),
        ({"hash": True}, "hash: "),
    ],
)
def test_description_with_invalid_field_is_an_error(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    """Each would fail after the claim: in libvirt, or as an internal error."""
    file = build(tmp_path / "one") / "image.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ImageError, match=f"guest image one is damaged: image.json: .*({text})") as caught:
        find_image(tmp_path, "one")
    assert "\n" not in caught.value.message
    assert f"nohype image build one --output {tmp_path}`" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"cmdline": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "[]",
        "null",
        '"x"',
        "\xff",
        '{"cmdline": ' + "9" * 5000 + "}",
    ],
)
def test_description_of_another_shape_is_an_error(tmp_path: Path, content: str) -> None:
    (build(tmp_path / "one") / "image.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ImageError, match="guest image one is damaged: image.json: "):
        find_image(tmp_path, "one")


@pytest.mark.parametrize("name", ["lost+found", ".Trash-0", ".import-abc", "#recycle"])
def test_folder_that_is_no_image_is_not_listed(tmp_path: Path, name: str) -> None:
    """As in a store that is a file system of its own."""
    build(tmp_path / "one")
    (tmp_path / name).mkdir()
    assert image_names(tmp_path) == ("one",)
    assert [len(part) for part in list_images(tmp_path)] == [1, 0]


@pytest.mark.parametrize("name", ["image.json", "vmlinuz", "initrd"])
def test_fifo_in_an_image_does_not_block(tmp_path: Path, name: str) -> None:
    file = build(tmp_path / "one") / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ImageError, match=f"{name} is not a regular file"):
        find_image(tmp_path, "one")
