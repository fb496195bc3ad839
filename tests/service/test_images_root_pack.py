"""Packs a small root with programs of this machine: as an initramfs, and as a file system."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from orchestrator.errors import ImageError
from orchestrator.host.run import run
from orchestrator.images.customize import EPOCH
from orchestrator.images.root_pack import LABEL, derive_uuid, pack_disk, pack_ram_root
from orchestrator.values import Size

PROGRAMS = {"usr/bin/zstd": "zstd", "usr/sbin/mke2fs": "/usr/sbin/mke2fs"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("etc", "usr/lib/systemd", "usr/lib64", "usr/sbin", "usr/bin", "run"):
        (root / name).mkdir(parents=True)
    (root / "usr/lib64/ld-linux-x86-64.so.2").symlink_to("/usr/lib64/ld-linux-x86-64.so.2")
    (root / "usr/lib/x86_64-linux-gnu").symlink_to("/usr/lib/x86_64-linux-gnu")
    (root / "etc/mke2fs.conf").symlink_to("/etc/mke2fs.conf")
    for target, program in PROGRAMS.items():
        found = shutil.which(program)
        if found is None:
            pytest.skip(f"{program} is not installed")
        (root / target).symlink_to(found)
    (root / "usr/lib/systemd/systemd").write_bytes(b"x" * 5000)
    (root / "etc/name with spaces").write_text("y")
    (root / "etc/fstab").write_text("of the package\n")
    (tmp_path / "init").write_text("#!/bin/sh\n")
    return root


def copy_of(root: Path) -> Path:
    """With other times, and files created in another order."""
    copy = root.with_name("copy")
    shutil.copytree(root, copy, symlinks=True, copy_function=shutil.copyfile)
    for path in copy.rglob("*"):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE((root / path.relative_to(copy)).stat().st_mode))
    return copy


def unpack(archive: Path, folder: Path) -> Path:
    folder.mkdir()
    plain = folder.with_suffix(".cpio")
    run(["zstd", "-q", "-d", archive, "-o", plain])
    run(["cpio", "--extract", "--quiet", "--make-directories", "--no-preserve-owner", f"--file={plain}"], cwd=folder)
    return folder


def read_times(archive: Path) -> dict[str, int]:
    """Times of the entries of a newc archive (cpio(5)): 13 fields of 8 hexadecimal digits after 6 bytes; all is padded to 4."""
    data, times, at = archive.read_bytes(), {}, 0
    while True:
        fields = [int(data[at + 6 + 8 * field : at + 14 + 8 * field], 16) for field in range(13)]
        size, length = fields[6], fields[11]
        name = data[at + 110 : at + 109 + length].decode()
        if name == "TRAILER!!!":
            return times
        times[name] = fields[5]
        at += 110 + length + -(110 + length) % 4
        at += size + -size % 4


def test_ram_root_contains_all_files(root: Path, tmp_path: Path) -> None:
    unpacked = pack_ram_root(root, tmp_path / "init", tmp_path / "ram-initrd")
    tree = unpack(tmp_path / "ram-initrd", tmp_path / "tree")
    assert (tree / "init").read_text() == "#!/bin/sh\n"
    assert os.access(tree / "init", os.X_OK)
    assert (tree / "etc/fstab").read_text() == ""
    assert (tree / "etc/name with spaces").read_text() == "y"
    assert not (root / "init").exists()
    times = read_times(tree.with_suffix(".cpio"))
    assert "etc/fstab" in times
    assert {name for name, time in times.items() if time > EPOCH} == set()
    files = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size]
    assert unpacked >= sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["init", "ram-initrd", "root", "tree", "tree.cpio"]


def test_equal_roots_give_equal_archives(root: Path, tmp_path: Path) -> None:
    copy = copy_of(root)
    for tree, name in ((root, "one"), (copy, "two")):
        pack_ram_root(tree, tmp_path / "init", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (copy / "etc/more").touch()
    pack_ram_root(copy, tmp_path / "init", tmp_path / "two")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_disk_is_a_sparse_file_system_with_the_root(root: Path, tmp_path: Path) -> None:
    pack_disk(root, Size.parse("64M"), "identity", tmp_path / "disk.raw")
    info = (tmp_path / "disk.raw").stat()
    assert info.st_size == 64 << 20
    assert info.st_blocks * 512 < 16 << 20
    found = run(["/usr/sbin/dumpe2fs", "-h", tmp_path / "disk.raw"]).stdout
    assert f"Filesystem volume name:   {LABEL}" in found
    assert f"Filesystem UUID:          {derive_uuid('identity')}" in found
    shown = run(["/usr/sbin/debugfs", "-R", "cat /etc/fstab", tmp_path / "disk.raw"]).stdout
    assert shown.startswith(f"LABEL={LABEL} / ext4 ")
    for name in ("/etc", "/etc/fstab"):
        assert f" mtime: {EPOCH:#x}:" in run(["/usr/sbin/debugfs", "-R", f"stat {name}", tmp_path / "disk.raw"]).stdout


def test_root_that_does_not_fit_is_an_error(root: Path, tmp_path: Path) -> None:
    (root / "usr/lib/large").write_bytes(os.urandom(12 << 20))
    with pytest.raises(ImageError, match="cannot pack the root into a file system of 8M"):
        pack_disk(root, Size.parse("8M"), "identity", tmp_path / "disk.raw")
