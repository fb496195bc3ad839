"""Roots of guests: overlays, cuts and what identifies a machine, in folders; and which kernel modules are removed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ImageError
from orchestrator.images.customize import EPOCH, clamp_times, customize, plan_removed_modules, remove_identity
from orchestrator.images.recipe import RootRecipe

NEEDS = {
    "kernel/sound/core/snd.ko.xz": ("kernel/sound/soundcore.ko.xz",),
    "kernel/sound/soundcore.ko.xz": (),
    "kernel/drivers/mtd/mtd.ko.xz": (),
    "kernel/drivers/mtd/ubi.ko.xz": ("kernel/drivers/mtd/mtd.ko.xz",),
    "kernel/drivers/net/ethernet/sfc.ko.xz": ("kernel/drivers/mtd/mtd.ko.xz",),
    "kernel/drivers/net/wan/hdlc.ko.xz": (),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("etc/ssh", "etc/modprobe.d", "var/log/apt", "var/tmp", "var/lib", "boot", "run", "tmp"):
        (root / name).mkdir(parents=True)
    return root


def recipe(**fields: Any) -> RootRecipe:
    return RootRecipe.model_validate(
        {"kind": "debian", "description": "d", "packages": ["pp"], "modules": [], "init": "init", "cmdline": "quiet"}
        | {"memory": "256M", "disk": "512M", **fields}
    )


def layer(tmp_path: Path, name: str, **files: str) -> Path:
    for file, text in files.items():
        path = tmp_path / name / "overlay" / "etc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / name


def test_later_layers_replace_files_of_earlier_ones(root: Path, tmp_path: Path) -> None:
    layers = [layer(tmp_path, "base", one="base", two="base"), layer(tmp_path, "above", two="above")]
    (layers[1] / "overlay/etc/two").chmod(0o700)
    customize(root, recipe(), layers)
    assert (root / "etc/one").read_text() == "base"
    assert (root / "etc/two").read_text() == "above"
    assert (root / "etc/one").stat().st_mode & 0o7777 == 0o644
    assert (root / "etc/two").stat().st_mode & 0o7777 == 0o755


def test_overlay_does_not_leave_the_root(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (root / "etc/linked").symlink_to(tmp_path / "outside")
    source = tmp_path / "base/overlay/etc/linked"
    source.mkdir(parents=True)
    (source / "file").write_text("x")
    with pytest.raises(ImageError, match="leads out of the root"):
        customize(root, recipe(), [tmp_path / "base"])
    assert list((tmp_path / "outside").iterdir()) == []


def test_cut_masks_units_and_generators(root: Path) -> None:
    (root / "etc/systemd/system").mkdir(parents=True)
    (root / "etc/systemd/system/b.service").symlink_to("/usr/lib/systemd/system/c.service")
    customize(root, recipe(cut=[{"reason": "r", "units": ["a@1.timer", "b.service"], "generators": ["g"]}]), [])
    for name in ("system/a@1.timer", "system/b.service", "system-generators/g"):
        assert os.readlink(root / "etc/systemd" / name) == "/dev/null"


def test_cut_removes_files_and_blacklists_modules(root: Path) -> None:
    (root / "usr/lib/dri").mkdir(parents=True)
    (root / "usr/lib/dri/x.so").touch()
    (root / "usr/lib/libLLVM.so.19").touch()
    cuts = [
        {"reason": "r", "files": ["usr/lib/libLLVM*", "usr/lib/dri"], "blacklist": ["one"]},
        {"reason": "s", "blacklist": ["two"]},
    ]
    customize(root, recipe(cut=cuts), [])
    assert list((root / "usr/lib").iterdir()) == []
    assert (root / "etc/modprobe.d/nohype.conf").read_text() == "blacklist one\nblacklist two\n"


def test_cut_of_nothing_is_an_error(root: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot cut usr/lib/libLLVM\*: no file of the root matches"):
        customize(root, recipe(cut=[{"reason": "r", "files": ["usr/lib/libLLVM*"]}]), [])


def test_cut_does_not_follow_links_out_of_the_root(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (root / "usr").symlink_to(outside)
    with pytest.raises(ImageError, match="no file of the root matches"):
        customize(root, recipe(cut=[{"reason": "r", "files": ["usr/*"]}]), [])
    assert (outside / "file").exists()


def test_nothing_identifies_a_machine(root: Path) -> None:
    for name in ("etc/ssh/ssh_host_rsa_key", "etc/hostname", "etc/machine-id", "var/log/apt/history.log", "boot/vmlinuz-1"):
        (root / name).write_text("of this machine")
    (root / "etc/resolv.conf").symlink_to("../run/of-this-machine")
    remove_identity(root)
    left = [path for path in root.rglob("*") if path.is_file() and path.read_text()]
    assert left == []
    assert not (root / "etc/hostname").exists()
    assert (root / "etc/machine-id").read_text() == ""
    assert "this-machine" not in os.readlink(root / "etc/resolv.conf")
    assert (root / "var/log/apt").is_dir()


def test_no_file_is_newer_than_the_epoch(root: Path) -> None:
    old = root / "etc/old"
    old.touch()
    os.utime(old, (5, 5))
    (root / "etc/link").symlink_to("old")
    clamp_times(root)
    assert old.stat().st_mtime == 5
    assert max(path.lstat().st_mtime for path in (root, *root.rglob("*"))) == EPOCH


def test_module_that_others_need_is_kept() -> None:
    removed = plan_removed_modules(NEEDS, ["sound", "drivers/mtd", "drivers/net/wa?"])
    assert removed == (
        "kernel/drivers/mtd/ubi.ko.xz",
        "kernel/drivers/net/wan/hdlc.ko.xz",
        "kernel/sound/core/snd.ko.xz",
        "kernel/sound/soundcore.ko.xz",
    )
    assert plan_removed_modules(NEEDS, ["sound/core"]) == ("kernel/sound/core/snd.ko.xz",)
    assert plan_removed_modules(NEEDS, []) == ()
