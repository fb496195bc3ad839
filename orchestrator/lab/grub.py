"""GRUB for BIOS on a GPT disk, installed into a file."""

from __future__ import annotations

import struct
from pathlib import Path

SECTOR = 512
FOLDER = "usr/lib/grub/i386-pc"  # in the root of a system with the package grub-pc-bin
MODULES = (
    "biosdisk", "part_gpt", "ext2", "fat", "normal", "configfile", "linux", "search", "search_fs_uuid", "serial", "terminal",
)  # fmt: skip


def install_grub(disk: Path, root: Path, core: Path, start: int) -> None:
    """What grub-bios-setup does to a device (GRUB_BOOT_MACHINE_KERNEL_SECTOR of boot.S, and the blocklist of diskboot.S).

    ``start``: bytes until the BIOS boot partition, which gets ``core``, the output of grub-mkimage.
    """
    boot, image = bytearray((root / FOLDER / "boot.img").read_bytes()), bytearray(core.read_bytes())
    struct.pack_into("<Q", boot, 0x5C, start // SECTOR)
    struct.pack_into("<Q", image, SECTOR - 12, start // SECTOR + 1)
    with disk.open("r+b") as file:
        file.write(boot[:440])  # the partition table follows
        file.seek(510)
        file.write(b"\x55\xaa")
        file.seek(start)
        file.write(image)
