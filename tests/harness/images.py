"""Small builds of guest images."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from orchestrator.images.description import Description, DiskImage, write_description
from orchestrator.values import Size


def make_build(folder: Path, kernel: str = "kernel", disk: bytes | None = None, **fields: Any) -> Path:
    """A folder as `build_image` leaves it; ``kernel`` is the content of vmlinuz."""
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_text(kernel)
    (folder / "initrd").write_text("initrd")
    if disk is not None:
        (folder / "disk.raw").write_bytes(disk)
        fields["disk"] = DiskImage(size=len(disk), sha256=hashlib.sha256(disk).hexdigest(), layout="ext4")
    texts = {"kernel_version": "6.12", "hash": "abc", "description": "d", "cmdline": "quiet", "console": "nohype-1"}
    write_description(folder, Description(**{"memory": Size.parse("96M"), **texts, **fields}))
    return folder


def list_store(store: Path) -> dict[str, str]:
    """Each name, and the content of the kernel it links to; ``.builds`` with their number; hidden files other than the lock."""
    found = {}
    for path in store.iterdir():
        if path.name == ".builds":
            found[path.name] = str(len(list(path.iterdir())))
        elif path.name != ".lock":
            found[path.name] = (path / "vmlinuz").read_text() if not path.name.startswith(".") else "hidden"
    return found


def unpack_initrd(initrd: Path, folder: Path) -> Path:
    """Unpacks the first archive of an initrd, for tests whose images have an empty one, into a new folder; returns that."""
    folder.mkdir()
    with initrd.open("rb") as file:
        subprocess.run(["cpio", "-idm", "--quiet", "--no-absolute-filenames"], stdin=file, cwd=folder, check=True, timeout=60)
    return folder
