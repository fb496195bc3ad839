"""The content of image.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.description import Description, DiskImage, Provenance, RamRoot, write_description
from orchestrator.images.store import read_image

SHA = "0123456789abcdef" * 4
OLD = {"cmdline": "quiet", "console": "nohype-1", "hash": "abc", "kernel_version": "6.12", "memory": "96M"}
FULL = {
    **OLD,
    "disk": {"size": 1 << 30, "sha256": SHA, "layout": "ext4"},
    "ram_root": {"packed": 60 << 20, "unpacked": 170 << 20},
    "ready": "ssh",
    "configuration": ["credentials", "cloud-init"],
    "provenance": {
        "recipe": "debian",
        "packages": {"systemd": "257.8-1"},
        "lock": SHA,
        "tools": {"mke2fs": "1.47.2"},
        "source": None,
    },
}


def read(fields: dict[str, Any]) -> Description:
    return Description.model_validate_json(json.dumps(fields))


def test_description_of_an_earlier_version_gets_the_defaults() -> None:
    old = read(OLD)
    assert (old.disk, old.ram_root, old.boot, old.configuration, old.provenance) == (None, None, "direct", (), None)
    assert old.required_files == ("vmlinuz", "initrd")


def test_readiness_is_derived_from_the_console_only_if_it_is_absent() -> None:
    assert read(OLD).ready == "console"
    assert read({**OLD, "console": None}).ready is None
    assert read({**OLD, "console": "another-1"}).ready is None
    assert read({**OLD, "ready": None}).ready is None
    assert read({**OLD, "ready": "notify"}).ready == "notify"


def test_written_description_is_read_back_equal(tmp_path: Path) -> None:
    full = read(FULL)
    assert full.disk == DiskImage(size=1 << 30, sha256=SHA, layout="ext4")
    assert full.provenance == Provenance(recipe="debian", packages={"systemd": "257.8-1"}, lock=SHA, tools={"mke2fs": "1.47.2"})
    for name in full.required_files:
        (tmp_path / name).touch()
    write_description(tmp_path, full)
    assert Description(**dict(read_image(tmp_path))) == full


@pytest.mark.parametrize("unpacked", [1 << 20, 175 << 20, 2 << 30])
def test_root_in_ram_fits_into_half_of_the_memory_that_is_left(unpacked: int) -> None:
    root = RamRoot(packed=unpacked // 2, unpacked=unpacked)
    memory = root.min_memory.bytes
    kernel = (60 << 20) + memory // 64
    assert unpacked <= (memory - kernel - root.packed) // 2 < unpacked + (2 << 20)
    assert memory % (2 << 20) == 0


@pytest.mark.parametrize("missing", ["vmlinuz", "initrd", "ram-initrd", "disk.raw"])
def test_build_without_a_file_that_it_describes_is_damaged(tmp_path: Path, missing: str) -> None:
    full = read(FULL)
    for name in set(full.required_files) - {missing}:
        (tmp_path / name).touch()
    write_description(tmp_path, full)
    with pytest.raises(ImageError, match=f"is damaged: missing {missing}\n"):
        read_image(tmp_path)


def test_build_that_boots_by_firmware_needs_no_kernel() -> None:
    assert read({**FULL, "boot": "firmware", "ram_root": None}).required_files == ("disk.raw",)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"disk": {"size": -1, "sha256": SHA, "layout": "ext4"}}, "disk.size"),
        ({"disk": {"size": 1.5, "sha256": SHA, "layout": "ext4"}}, "disk.size"),
        ({"disk": {"size": True, "sha256": SHA, "layout": "ext4"}}, "disk.size"),
        ({"disk": {"size": 1 << 60, "sha256": SHA, "layout": "ext4"}}, "disk.size"),
        ({"disk": {"size": 1, "sha256": SHA[1:], "layout": "ext4"}}, "disk.sha256"),
        ({"disk": {"size": 1, "sha256": SHA.upper(), "layout": "ext4"}}, "disk.sha256"),
        ({"disk": {"size": 1, "sha256": SHA + "\n", "layout": "ext4"}}, "disk.sha256"),
        ({"disk": {"size": 1, "sha256": SHA, "layout": "xfs"}}, "disk.layout"),
        ({"disk": {"size": 1, "sha256": SHA}}, "disk.layout"),
        ({"disk": []}, "disk"),
        ({"ram_root": {"packed": 1, "unpacked": -1}}, "ram_root.unpacked"),
        ({"ram_root": {"packed": "1M", "unpacked": 1}}, "ram_root.packed"),
        ({"boot": "bios"}, "boot"),
        ({"boot": "firmware"}, "firmware boots from a disk"),
        ({"ready": "soon"}, "ready"),
        ({"ready": []}, "ready"),
        ({"configuration": ["ignition"]}, "configuration.0"),
        ({"configuration": "cloud-init"}, "configuration"),
        ({"configuration": ["cloud-init", "cloud-init"]}, "twice"),
        ({"provenance": {"packages": {"a": 1}}}, "provenance.packages.a"),
        ({"provenance": {"packages": {"a": "1\x1b[31m"}}}, "provenance.packages.a"),
        ({"provenance": {"lock": "abc"}}, "provenance.lock"),
        ({"provenance": {"source": "a\nb"}}, "provenance.source"),
    ],
)
def test_invalid_field_is_named(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    (tmp_path / "image.json").write_text(json.dumps({**OLD, **change}))
    for name in ("vmlinuz", "initrd"):
        (tmp_path / name).touch()
    with pytest.raises(ImageError, match="is damaged: image.json: ") as caught:
        read_image(tmp_path)
    assert text in caught.value.message
    assert "\n" not in caught.value.message
