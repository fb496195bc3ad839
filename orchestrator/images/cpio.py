"""Writes a cpio archive in the newc format, which the kernel unpacks into its first root file system
(Documentation/driver-api/early-userspace/buffer-format.rst). The same files give the same bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import PurePosixPath

ALIGNMENT = 4
"""Bytes: the kernel looks for the header of a further archive only at a multiple (init/initramfs.c, unpack_to_rootfs)."""

_MAGIC, _END = "070701", "TRAILER!!!"


def build_archive(files: Mapping[str, bytes]) -> bytes:
    """An archive of files, readable only by root, with their folders. Names are relative to the root folder."""
    folders = {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
    entries = [(folder, stat.S_IFDIR | 0o755, 2, b"") for folder in folders]
    entries += [(name, stat.S_IFREG | 0o600, 1, content) for name, content in files.items()]
    # Sorted: a folder comes before its files.
    parts = [_entry(number, *entry) for number, entry in enumerate(sorted(entries), start=1)]
    return b"".join((*parts, _entry(0, _END, 0, 1, b"")))


def pad(size: int) -> bytes:
    """The bytes between a file of this size and an archive that is appended to it."""
    return bytes(-size % ALIGNMENT)


def _entry(inode: int, name: str, mode: int, links: int, content: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = _MAGIC.encode() + b"".join(b"%08X" % field for field in fields) + encoded
    return head + pad(len(head)) + content + pad(len(content))
