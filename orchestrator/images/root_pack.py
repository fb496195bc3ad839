"""Packs a Debian root: as an initramfs that is the root, and as a file system for a guest's disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid5

from orchestrator.errors import CommandError, ImageError
from orchestrator.host.run import run
from orchestrator.images.customize import EPOCH, clamp_times
from orchestrator.values import Size

LABEL = "nohype-root"
"""The label of the root file system, by which the initramfs finds the guest's disk."""

_ZSTD_LEVEL = "-3"  # -19 takes 75 s instead of 0.6 s, and saves 14 %
_BLOCK = 4096


def pack_ram_root(root: Path, init: Path, output: Path) -> int:
    """Writes the root with ``init`` as /init, and an empty fstab; returns the unpacked size in bytes, in whole pages."""
    shutil.copyfile(init, root / "init")
    (root / "init").chmod(0o755)
    (root / "etc/fstab").write_text("")
    clamp_times(root)
    try:
        paths = [root, *sorted(root.rglob("*"), key=str)]
        names = "".join(f"{path.relative_to(root)}\0" for path in paths)
        plain = output.with_suffix(".cpio")
        argv = ["cpio", "--create", "--null", "--format=newc", "--reproducible", "--quiet", f"--file={plain}"]
        run(argv, cwd=root, input=names, timeout=300)
        run_from(root, "usr/bin/zstd", ["--quiet", "--force", "--rm", _ZSTD_LEVEL, "-o", output, plain])
    finally:
        (root / "init").unlink()
    return sum(_in_pages(path.lstat().st_size) for path in paths if path.is_file() or path.is_symlink())


def pack_disk(root: Path, size: Size, identity: str, output: Path) -> None:
    """Writes an ext4 file system of the given size with the root, as a sparse file.

    ``identity``: text from which the UUID of the file system is made, which makes two builds equal.
    """
    (root / "etc/fstab").write_text(f"LABEL={LABEL} / ext4 noatime,x-systemd.growfs 0 1\n")
    clamp_times(root)
    uuid = derive_uuid(identity)
    argv: list[str | Path] = [
        "-q", "-F", "-b", "4096", "-t", "ext4", "-m", "0", "-L", LABEL, "-U", str(uuid),
        "-E", f"hash_seed={uuid},lazy_itable_init=0,root_owner=0:0", "-d", root, output, f"{size.bytes // 1024}k",
    ]  # fmt: skip
    try:
        # mke2fs before 1.47.2 writes the times of the copied files, which differ between two copies
        run_from(root, "usr/sbin/mke2fs", argv, env={"SOURCE_DATE_EPOCH": str(EPOCH)})
    except CommandError as error:
        raise ImageError(
            f"cannot pack the root into a file system of {size}: {error.message}", "increase `disk` in the recipe"
        ) from None


def derive_uuid(identity: str) -> UUID:
    return uuid5(NAMESPACE_URL, f"nohype-image:{identity}")


def run_from(root: Path, program: str, arguments: Sequence[str | Path], env: dict[str, str] | None = None) -> str:
    """Runs a program of the root with the root's own libraries, but on this machine's files."""
    loader = root / "usr/lib64/ld-linux-x86-64.so.2"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    config = {"MKE2FS_CONFIG": str(root / "etc/mke2fs.conf"), **(env or {})}
    return run([loader, "--library-path", libraries, root / program, *arguments], timeout=300, env=config).stdout


def _in_pages(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
