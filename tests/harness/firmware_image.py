"""A disk that only its firmware can boot: GRUB, kernel and initrd with unusual names on a FAT partition, the root of `debian`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from orchestrator.images import apt, debian
from orchestrator.images.cache import build_cached, hash_inputs, remove_tree
from orchestrator.images.root_pack import run_from
from orchestrator.images.store import Image
from orchestrator.lab import grub
from orchestrator.lab.grub import FOLDER, MODULES, SECTOR, install_grub
from tests.harness.disk_images import MB, make_fat

FILE = "firmware.qcow2"
BOOTED = "nohype.test=grub"
"""A word of the kernel command line that GRUB gives."""

_BIOS, _BOOT, _ROOT = 1 * MB, 3 * MB, 51 * MB  # where the partitions start


def size(image: Image) -> int:
    """Of the disk, in bytes."""
    assert image.disk
    return _ROOT + image.disk.size + MB


def build_firmware_image(image: Image, cache: Path) -> Path:
    """The qcow2 file, from a build of `debian`; do not change it."""

    def build(folder: Path) -> None:
        raw, boot, core, root = (folder / name for name in ("raw", "boot", "core", "root"))
        debian.make_root(
            root, ("grub-pc-bin", "grub-common"), cache=cache, log=cache / "log" / "test-firmware.log", variant="extract"
        )
        words = ["-O", "i386-pc", "-d", root / FOLDER, "-o", core, "-p", "(hd0,gpt2)/", *MODULES]
        run_from(root, "usr/bin/grub-mkimage", words)
        files = {"grub.cfg": _configure(image), "linux": image.kernel.read_bytes(), "initrd": image.initrd.read_bytes()}
        make_fat(boot, files, size=_ROOT - _BOOT)
        _partition(raw, size(image))
        install_grub(raw, root, core, _BIOS)
        for source, start in ((boot, _BOOT), (image.disk_file, _ROOT)):
            words = [f"if={source}", f"of={raw}", "bs=1M", f"seek={start // MB}", "conv=notrunc,sparse", "status=none"]
            subprocess.run(["dd", *map(str, words)], check=True)
        subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, folder / FILE], check=True)
        for path in (raw, boot, core):
            path.unlink()
        remove_tree(root)

    key = hash_inputs(apt.SUITE, image.hash, Path(__file__), Path(grub.__file__))
    return build_cached(cache, "test-firmware", key, build, progress=print, keep=1) / FILE


def _configure(image: Image) -> bytes:
    lines = ("serial --unit=0", "terminal_output serial", f"linux /linux {image.cmdline} {BOOTED}", "initrd /initrd", "boot")
    return "".join(f"{line}\n" for line in lines).encode()


def _partition(raw: Path, total: int) -> None:
    with raw.open("xb") as file:
        file.truncate(total)
    parts = (
        (_BIOS, _BOOT, "21686148-6449-6E6F-744E-656564454649"),
        (_BOOT, _ROOT, "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"),
        (_ROOT, total - MB, "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"),
    )
    lines = [f"start={start // SECTOR}, size={(end - start) // SECTOR}, type={kind}" for start, end, kind in parts]
    table = "\n".join(("label: gpt", *lines))
    subprocess.run(["sfdisk", "--quiet", raw], input=table.encode(), check=True)
