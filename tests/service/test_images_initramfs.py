"""Packs an initramfs with the real cpio from a minimal root."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import time
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images.initramfs import build_initramfs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    library = root / "usr/lib/modules/6.12"
    (library / "kernel").mkdir(parents=True)
    (library / "kernel/igbvf.ko.xz").write_bytes(lzma.compress(b"the driver"))
    (library / "modules.dep").write_text("kernel/igbvf.ko.xz:\n")
    (library / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    (library / "modules.alias").write_text("alias pci:v00008086d000010CAsv*sd*bc*sc*i* igbvf\n")
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-6.12").touch()
    (root / "usr/bin").mkdir()
    (root / "usr/bin/busybox").write_text("busybox")
    (tmp_path / "init").write_text("#!/bin/sh\n")
    return root


def unpack(archive: Path, folder: Path) -> Path:
    folder.mkdir()
    plain = folder.with_suffix(".cpio")
    plain.write_bytes(gzip.decompress(archive.read_bytes()))
    run(["cpio", "--extract", "--quiet", "--make-directories", f"--file={plain}"], cwd=folder)
    return folder


def test_contents(root: Path, tmp_path: Path) -> None:
    build_initramfs(root, tmp_path / "init", ["igbvf", "virtio_pci"], tmp_path / "initrd")
    tree = unpack(tmp_path / "initrd", tmp_path / "tree")
    assert (tree / "lib/modules/6.12/igbvf.ko").read_bytes() == b"the driver"
    assert (tree / "lib/modules/6.12/modules.dep").read_text() == "igbvf.ko:\n"
    assert os.access(tree / "init", os.X_OK)
    assert os.access(tree / "bin/busybox", os.X_OK)
    assert os.readlink(tree / "bin/sh") == "busybox"


def test_same_inputs_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    build_initramfs(root, tmp_path / "init", ["igbvf"], tmp_path / "one")
    time.sleep(1.1)  # cpio and gzip keep times in seconds
    build_initramfs(root, tmp_path / "init", ["igbvf"], tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["init", "one", "root", "two"]


def test_driver_without_devices_is_an_error(root: Path, tmp_path: Path) -> None:
    (root / "usr/lib/modules/6.12/modules.alias").write_text("")
    with pytest.raises(ImageError, match="no devices for igbvf"):
        build_initramfs(root, tmp_path / "init", ["igbvf"], tmp_path / "initrd")


def test_root_without_busybox_is_an_error(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "usr/bin")
    with pytest.raises(ImageError, match="busybox"):
        build_initramfs(root, tmp_path / "init", ["igbvf"], tmp_path / "initrd")
