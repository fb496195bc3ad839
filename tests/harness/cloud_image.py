"""A disk image as distributions publish it: GPT, GRUB in a BIOS boot partition, an EFI partition, an ext4 root with cloud-init.

Built from packages, since a test downloads no image. Takes two minutes with downloads; it is cached. Requires root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from textwrap import dedent

from orchestrator.images import apt, debian
from orchestrator.images.cache import build_cached, hash_inputs, remove_tree
from orchestrator.images.initramfs import find_kernel
from orchestrator.lab import grub
from orchestrator.lab.grub import FOLDER, MODULES, SECTOR, install_grub
from tests.harness.disk_images import MB, make_fat

FILE = "cloud.qcow2"
DISK = 1200 * MB

_UUID = "6d1bd4b0-5b3a-4c83-8d3c-0f6c1f1c7a11"
_BIOS, _ESP, _ROOT = (1 * MB, 2 * MB), (3 * MB, 32 * MB), (35 * MB, DISK - 36 * MB)  # start and size
_PACKAGES = (
    "linux-image-amd64", "initramfs-tools", "zstd", "systemd-sysv", "systemd-resolved", "udev", "dbus", "openssh-server",
    "netplan.io", "cloud-init", "cloud-guest-utils", "sudo", "e2fsprogs", "fdisk", "grub-pc-bin", "grub-common", "iproute2",
    "kmod", "login", "passwd",
)  # fmt: skip


def build_cloud_image(cache: Path) -> Path:
    """The qcow2 file; do not change it."""

    def build(folder: Path) -> None:
        root = folder / "root"
        debian.make_root(root, _PACKAGES, cache=cache, log=cache / "log" / "test-cloud.log", variant="apt")
        _configure(root)
        raw = folder / "raw"
        _pack(root, raw, folder)
        _run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, folder / FILE)
        raw.unlink()
        remove_tree(root)

    key = hash_inputs(apt.SUITE, Path(__file__), Path(grub.__file__))
    return build_cached(cache, "test-cloud", key, build, progress=print, keep=1) / FILE


def _configure(root: Path) -> None:
    version, _ = find_kernel(root)
    (root / "etc/fstab").write_text(f"UUID={_UUID} / ext4 errors=remount-ro 0 1\n")
    (root / "etc/hostname").write_text("localhost\n")
    for pattern in ("etc/ssh/ssh_host_*", "etc/machine-id"):
        for path in root.glob(pattern):
            path.unlink()
    (root / "etc/machine-id").write_text("uninitialized\n")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    _run("chroot", root, "systemctl", "--quiet", "enable", "systemd-networkd.service")
    (root / "boot/grub").mkdir(exist_ok=True)
    (root / "boot/grub/grub.cfg").write_text(
        dedent(f"""\
        serial --unit=0 --speed=115200
        terminal_output serial
        search --no-floppy --fs-uuid --set=root {_UUID}
        linux /boot/vmlinuz-{version} root=UUID={_UUID} ro console=ttyS0 panic=-1
        initrd /boot/initrd.img-{version}
        boot
        """)
    )
    shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)


def _pack(root: Path, raw: Path, folder: Path) -> None:
    words = ("-O", "i386-pc", "-d", f"/{FOLDER}", "-o", "/core.img", "-p", "(,gpt1)/boot/grub")
    _run("chroot", root, "grub-mkimage", *words, *MODULES)
    core = (root / "core.img").rename(folder / "core.img")
    parts = {"root": folder / "part-root", "esp": folder / "part-esp"}
    environment = {**os.environ, "E2FSPROGS_FAKE_TIME": "1760000000"}
    subprocess.run(["truncate", "-s", str(_ROOT[1]), parts["root"]], check=True)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-U", _UUID, "-d", root, parts["root"]], check=True, env=environment)
    make_fat(parts["esp"], {"README": b"EFI boot is not part of this image\n"}, size=_ESP[1])
    with raw.open("xb") as file:
        file.truncate(DISK)
    table = f"""label: gpt
        1 : start={_ROOT[0] // SECTOR}, size={_ROOT[1] // SECTOR}, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709
        14 : start={_BIOS[0] // SECTOR}, size={_BIOS[1] // SECTOR}, type=21686148-6449-6E6F-744E-656564454649
        15 : start={_ESP[0] // SECTOR}, size={_ESP[1] // SECTOR}, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
        """
    subprocess.run(["sfdisk", "--quiet", raw], input=table.encode(), check=True)
    install_grub(raw, root, core, _BIOS[0])
    core.unlink()
    for part, (start, _) in ((parts["root"], _ROOT), (parts["esp"], _ESP)):
        _run("dd", f"if={part}", f"of={raw}", "bs=1M", f"seek={start // MB}", "conv=notrunc,sparse", "status=none")
        part.unlink()


def _run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
