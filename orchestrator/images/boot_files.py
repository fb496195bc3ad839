"""Finds how an image boots: its root file system, and the newest kernel with an initramfs."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ImageError
from orchestrator.images.filetree import FileTree
from orchestrator.images.partitions import Volume

_KERNEL = re.compile(r"vmlinuz-(.+)")
_INITRDS = ("initrd.img-{}", "initramfs-{}.img", "initrd-{}", "initramfs-{}", "initrd-{}.img")
_RELEASE = re.compile(r'^([A-Z_]+)=(?:"([^"\n]*)"|([^"\s]*))$', re.MULTILINE)
_ARCHIVES = (b"0707", b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18", b"\x5d\0\0", b"BZh", b"\x89LZO")


@dataclass(frozen=True)
class Kernel:
    tree: FileTree  # the root itself, or a partition for /boot
    version: str
    kernel: str  # paths in the tree
    initrd: str


@dataclass(frozen=True)
class System:
    """What is installed in a root file system."""

    name: str = ""  # of the distribution, printable ASCII
    cloud_init: bool = False
    initramfs_tools: bool = False


def find_root(trees: Sequence[FileTree]) -> FileTree | str:
    """The only root file system, or the reason why there is not one."""
    roots = [tree for tree in trees if {"etc", "usr"} <= {entry.name for entry in tree.list("/")}]
    if len(roots) > 1:
        return f"{len(roots)} root file systems ({', '.join(tree.volume.name for tree in roots)})"
    return roots[0] if roots else "no ext4 root file system"


def find_kernel(root: FileTree, others: Iterable[FileTree]) -> Kernel | str:
    """The newest kernel with an initramfs: in /boot of the root, otherwise at the top of another partition; or the reason."""
    for tree, folder in [(root, "boot"), *((other, "") for other in others)]:
        names = [entry.name for entry in tree.list(folder) if entry.kind in ("file", "link")]
        if pairs := match_kernels(names):
            version, kernel, initrd = pairs[0]
            return Kernel(tree, version, f"{folder}/{kernel}", f"{folder}/{initrd}")
    return "no kernel vmlinuz-VERSION with an initramfs in /boot"


def match_kernels(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Version, kernel and initramfs of kernels that have an initramfs of the same version, the newest first."""
    known, found = set(names), []
    for name in known:
        if match := _KERNEL.fullmatch(name):
            initrd = next((text for form in _INITRDS if (text := form.format(match[1])) in known), None)
            if initrd:
                found.append((match[1], name, initrd))
    return sorted(found, key=lambda pair: version_key(pair[0]), reverse=True)


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Numbers by value; a release after its candidates (6.12-rc1 < 6.12 < 6.12.1)."""
    parts: list[tuple[int, int, str]] = []
    for number, word in re.findall(r"(\d+)|([A-Za-z~]+)", version):
        candidate = word.startswith(("rc", "~"))
        parts.append((2, int(number), "") if number else (-1 if candidate else 1, 0, word))
    return (*parts, (0, 0, ""))


def read_system(root: FileTree) -> System:
    release = parse_os_release(root.read_text("/etc/os-release"))
    return System(
        name=release.get("PRETTY_NAME", ""),
        cloud_init=root.find("/usr/bin/cloud-init") is not None,
        initramfs_tools=root.find("/etc/initramfs-tools") is not None,
    )


def parse_os_release(text: str) -> dict[str, str]:
    """Values of os-release(5) that are printable ASCII of at most 100 characters."""
    values = ((match[1], match[2] if match[2] is not None else match[3]) for match in _RELEASE.finditer(text))
    return {key: value for key, value in values if len(value) <= 100 and value.isascii() and value.isprintable()}


def find_root_word(volume: Volume) -> str:
    """The kernel's root= for a file system; the UUID stays the same on the guest's disk."""
    if volume.uuid:
        return f"root=UUID={volume.uuid}"
    if volume.partuuid:
        return f"root=PARTUUID={volume.partuuid}"
    raise ImageError(f"cannot name the root file system ({volume.name}): it has no UUID", "give root=... in --cmdline")


def read_kernel_version(path: Path) -> str:
    """The version in the header of an x86 kernel image. Raises ImageError if the file is not one."""
    with path.open("rb") as file:
        head = file.read(64 << 10)
    if head[0x1FE:0x200] != b"\x55\xaa" or head[0x202:0x206] != b"HdrS":
        raise ImageError(f"{path.name} is not a Linux kernel for x86 (bzImage)", "give a vmlinuz file of an x86-64 distribution")
    start = struct.unpack("<H", head[0x20E:0x210])[0] + 0x200
    text = head[start : start + 200].split(b"\0")[0].split(b" ")[0].decode("ascii", errors="replace")
    return text if text.isascii() and text.isprintable() else ""


def check_initrd(path: Path) -> None:
    """Raises ImageError if the file does not start as an archive that the kernel unpacks."""
    with path.open("rb") as file:
        start = file.read(8)
    if not start.startswith(_ARCHIVES):
        raise ImageError(f"{path.name} is not an initramfs (a cpio archive, compressed or not)", "check the file")
