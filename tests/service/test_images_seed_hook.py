"""The hook is run by a shell in a root of its own, in the order of initramfs-tools' init."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from orchestrator.images.cpio import build_archive, pad
from orchestrator.images.seed_hook import append_seed_hook

# Of the programs in an initramfs without busybox (klibc-utils).
KLIBC = ("cat", "mkdir", "mv")


def unpack(archive: bytes, folder: Path) -> None:
    subprocess.run(["cpio", "-idm", "--quiet", "-D", folder], input=archive, check=True, timeout=60)


def boot(tmp_path: Path, *, seed: bool) -> Path:
    """Sources the hook, hides /run as a tmpfs does, and runs what was added to init-top. Returns the new /run."""
    initrd, root = tmp_path / "initrd", tmp_path / "root"
    initrd.write_bytes(b"abc")
    append_seed_hook(initrd)
    root.mkdir()
    unpack(initrd.read_bytes()[4:], root)
    if seed:
        unpack(build_archive({"run/cloud-seed/user-data": b"#cloud-config\n"}), root)
    (root / "scripts/init-top").mkdir(parents=True)
    (root / "scripts/init-top/ORDER").write_text("true\n")
    hook = (root / "conf/conf.d/nohype-seed").read_text()
    script = f"{hook}\nmv /run /hidden || true\nmkdir /run\n. /scripts/init-top/ORDER\n"
    for name in ("/run", "/scripts", "/nohype-seed", "/hidden"):
        script = script.replace(name, f"{root}{name}")
    (root / "run").mkdir(exist_ok=True)
    order = root / "scripts/init-top/ORDER"
    (tmp_path / "bin").mkdir()
    for name in KLIBC:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    subprocess.run(["/bin/sh", "-e", "-c", script], check=True, timeout=60, env={"PATH": str(tmp_path / "bin")})
    assert order.read_text().startswith("true\n")
    return root / "run"


def test_seed_is_in_the_new_run(tmp_path: Path) -> None:
    seed = boot(tmp_path, seed=True) / "cloud-seed"
    assert (seed / "user-data").read_text() == "#cloud-config\n"
    assert [path.stat().st_mode & 0o077 for path in (seed, seed / "user-data")] == [0, 0], "it is secret"


def test_hook_without_seed_does_nothing(tmp_path: Path) -> None:
    assert list(boot(tmp_path, seed=False).iterdir()) == []


def test_archive_is_aligned(tmp_path: Path) -> None:
    for size in range(1, 6):
        file = tmp_path / str(size)
        file.write_bytes(b"x" * size)
        append_seed_hook(file)
        assert file.read_bytes()[size + len(pad(size)) :].startswith(b"070701")
