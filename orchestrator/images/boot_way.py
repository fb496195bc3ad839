"""Decides how guests boot an imported disk: with a kernel out of the image, with a given kernel, or with their firmware."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.errors import ImageError
from orchestrator.images.boot_files import (
    System,
    check_initrd,
    find_kernel,
    find_root,
    find_root_word,
    read_kernel_version,
    read_system,
)
from orchestrator.images.cache import Progress
from orchestrator.images.description import DISK, INITRD, KERNEL
from orchestrator.images.filetree import FileTree
from orchestrator.images.partitions import Layout, read_layout
from orchestrator.images.seed_hook import append_seed_hook
from orchestrator.images.sparse import open_regular

Way = Literal["direct", "firmware"]

MAX_KERNEL, MAX_INITRD = 128 << 20, 1 << 30  # bytes
_MAX_FILE_SYSTEMS = 16


@dataclass(frozen=True)
class Boot:
    way: Way
    found: str  # what the image contains and why it boots in this way, for users
    version: str = ""  # of the kernel
    root: str = ""  # words for the kernel's command line
    system: System = System()
    partitioned: bool = False
    takes_seed: bool = False  # its initramfs passes /run/cloud-seed on to cloud-init


@dataclass(frozen=True)
class Given:
    """What the user has decided."""

    way: Way | None  # None: direct if possible
    kernel: bool  # kernel and initramfs are in the folder
    root: bool  # the command line has root=


def check_given_kernel(folder: Path) -> str:
    """The version of the kernel. Raises ImageError if kernel or initramfs are something else."""
    version = read_kernel_version(folder / KERNEL)
    check_initrd(folder / INITRD)
    return version


def find_boot(folder: Path, given: Given, *, progress: Progress) -> Boot:
    """For ``disk.raw`` of the folder; copies kernel and initramfs out of it, if none is given and they are needed.

    Raises ImageError if the disk is damaged, or no guest can boot from it.
    """
    version = check_given_kernel(folder) if given.kernel else ""
    with open_regular(folder / DISK) as descriptor:
        layout = read_layout(descriptor, os.fstat(descriptor).st_size)
    if given.way == "firmware":
        return _boot_firmware(layout, "as requested")
    progress("searching the image for its root file system and kernels")
    trees = [FileTree(folder, DISK, volume) for volume in layout.volumes if volume.kind in ("ext4", "fat")]
    if len(trees) > _MAX_FILE_SYSTEMS:
        return _boot_otherwise(layout, given, f"{len(trees)} file systems, at most {_MAX_FILE_SYSTEMS} are searched")
    root = find_root([tree for tree in trees if tree.volume.kind == "ext4"])
    if isinstance(root, str):
        if given.kernel and given.root:
            return Boot(
                "direct",
                f"{layout}; direct boot of the given kernel with the given root=",
                version,
                partitioned=bool(layout.table),
            )
        return _boot_otherwise(layout, given, root)
    return _boot_root(folder, layout, root, trees, given, version, progress)


def _boot_root(
    folder: Path, layout: Layout, root: FileTree, trees: Sequence[FileTree], given: Given, version: str, progress: Progress
) -> Boot:
    system = read_system(root)
    found = f"{layout}; root on {root.volume.name}{f' ({system.name})' if system.name else ''}"
    if given.kernel:
        found += "; direct boot of the given kernel"
    else:
        kernel = find_kernel(root, [tree for tree in trees if tree is not root])
        if isinstance(kernel, str):
            return _boot_otherwise(layout, given, kernel)
        for path, name, limit in ((kernel.kernel, KERNEL, MAX_KERNEL), (kernel.initrd, INITRD, MAX_INITRD)):
            progress(f"copying {path} out of the image")
            kernel.tree.copy(path, name, limit=limit)
        version = check_given_kernel(folder) or kernel.version
        if system.initramfs_tools:
            append_seed_hook(folder / INITRD)
        found += f"; direct boot of {kernel.kernel} on {kernel.tree.volume.name}"
    words = "" if given.root else f"{find_root_word(root.volume)} ro"
    takes_seed = system.cloud_init and system.initramfs_tools and not given.kernel
    return Boot("direct", found, version, words, system, bool(layout.table), takes_seed)


def _boot_otherwise(layout: Layout, given: Given, reason: str) -> Boot:
    if given.way == "direct" or given.kernel:
        hint = "give --kernel, --initrd and --cmdline with root=, or --boot firmware"
        raise ImageError(f"cannot boot the image directly: {reason} ({layout})", hint)
    return _boot_firmware(layout, f"direct boot is not possible: {reason}")


def _boot_firmware(layout: Layout, reason: str) -> Boot:
    if not layout.bios_code:
        raise ImageError(
            f"no guest can boot the image ({layout}): {reason}, and the first sector has no boot code for SeaBIOS",
            "give --kernel and --initrd, or an image that boots with BIOS",
        )
    found = f"{layout}; firmware boot (SeaBIOS) from the guest's own disk, {reason}"
    return Boot("firmware", found, partitioned=bool(layout.table))
