"""Imports images from elsewhere: a raw or qcow2 image of a disk, or a kernel and an initramfs with or without a root file system.

All reading happens on a private copy, which cannot change meanwhile. The kernel of the host never mounts it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

from orchestrator.errors import ImageError, RequestError
from orchestrator.images.boot_way import MAX_INITRD, MAX_KERNEL, Boot, Given, Way, check_given_kernel, find_boot
from orchestrator.images.cache import Progress, hash_inputs, locked, remove_tree
from orchestrator.images.description import INITRD, KERNEL, Description, DiskImage, Provenance, Readiness, write_description
from orchestrator.images.disk_source import Format, take_disk
from orchestrator.images.install import install_image
from orchestrator.images.sandbox import check_programs, read_versions
from orchestrator.images.source_copy import Copied, copy_sparse, explain_os_error
from orchestrator.images.sparse import hash_file
from orchestrator.images.store import Image
from orchestrator.locks import lock_file
from orchestrator.model.fields import check_name
from orchestrator.values import Size

MAX_SIZE = Size.parse("64G")
CMDLINE = "console=ttyS0 panic=-1"

_MEMORY = Size.parse("512M")
_MIN_RAM_ROOT = 256  # MB
_MAX_CMDLINE = 1900  # leaves room for root=; x86 kernels read 2047 characters


@dataclass(frozen=True)
class ImportRequest:
    name: str
    file: Path | None = None  # image of a disk; None: the initramfs is the root
    kernel: Path | None = None
    initrd: Path | None = None
    format: Format | None = None  # None: qcow2 if the file starts as one
    sha256: str | None = None  # of `file`
    boot: Way | None = None  # None: direct if a kernel is found
    cmdline: str | None = None  # None: CMDLINE; root= is added if it is missing
    memory: Size | None = None
    ready: Readiness | None = None
    configuration: tuple[Literal["credentials", "cloud-init"], ...] | None = None  # None: as found in the image
    max_size: Size = MAX_SIZE


def import_image(store: Path, request: ImportRequest, *, progress: Progress) -> Image:
    """Requires root. Nothing is left of an import that fails.

    Raises:
        RequestError: the arguments do not fit together.
        ImageError: the files cannot be read, are damaged or refused, or no guest can boot from them.
    """
    check_request(request)
    check_programs()
    with _workspace(store) as work:
        folder = work / request.name
        try:
            _fill(folder, request, progress)
        except OSError as error:
            raise explain_os_error(error, f"cannot import the image into {store}") from None
        progress("installing the image")
        return install_image(folder, store, request.name, move=True)


def check_request(request: ImportRequest) -> None:
    try:
        check_name(request.name)
    except ValueError as error:
        raise RequestError(f"invalid image name: {error}") from None
    if (request.kernel is None) != (request.initrd is None):
        raise RequestError("--kernel and --initrd must be given together")
    if request.file is None and request.kernel is None:
        raise RequestError("nothing to import", "give the image FILE of a disk, or --kernel and --initrd")
    if request.file is None and (request.sha256 or request.format):
        raise RequestError("--sha256 and --format require the image FILE of a disk")
    if request.boot == "firmware" and (request.kernel or request.cmdline or request.file is None):
        raise RequestError("a guest that boots with its firmware has no --kernel, --initrd and --cmdline", "leave them out")
    if request.cmdline and not (
        len(request.cmdline) <= _MAX_CMDLINE and request.cmdline.isascii() and request.cmdline.isprintable()
    ):
        raise RequestError(f"--cmdline must be at most {_MAX_CMDLINE} printable ASCII characters")
    if request.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", request.sha256):
        raise RequestError(f"invalid SHA-256 {request.sha256!r}: expected 64 hexadecimal digits")


def _fill(folder: Path, request: ImportRequest, progress: Progress) -> None:
    folder.mkdir()
    folder.chmod(0o755)  # whatever the umask: the sandbox's user reads it
    for path, name, limit in ((request.kernel, KERNEL, MAX_KERNEL), (request.initrd, INITRD, MAX_INITRD)):
        if path:
            copy_sparse(path, folder / name, limit=limit, progress=progress)
    if request.file:
        disk, source = take_disk(
            folder, request.file, format=request.format, sha256=request.sha256, limit=request.max_size.bytes, progress=progress
        )
        has_root = any(word.startswith("root=") for word in (request.cmdline or "").split())
        given = Given(request.boot, request.kernel is not None, has_root)
        description = _describe(folder, request, disk, source, find_boot(folder, given, progress=progress))
    else:
        boot = Boot("direct", "direct boot of the given kernel, the initramfs is the root", check_given_kernel(folder))
        description = _describe(folder, request, None, "", boot)
    write_description(folder, description)
    for path in folder.iterdir():
        path.chmod(0o644)  # QEMU reads the kernel as another user


def _describe(folder: Path, request: ImportRequest, disk: Copied | None, source: str, boot: Boot) -> Description:
    hashes = [hash_file(folder / name)[1] for name in (KERNEL, INITRD) if (folder / name).exists()]
    cloud_init = boot.system.cloud_init
    configuration = request.configuration if request.configuration is not None else (("cloud-init",) if boot.takes_seed else ())
    words = (boot.root, CMDLINE if request.cmdline is None else request.cmdline)
    cmdline = " ".join(filter(None, words)) if boot.way == "direct" else ""
    memory = request.memory or (_MEMORY if disk else _guess_memory(folder / INITRD))
    ready = request.ready or ("cloud-init" if cloud_init else None)
    facts = [*hashes, disk.sha256 if disk else "", boot.way, cmdline, str(memory), str(ready), *configuration]
    origin = request.file or request.kernel or folder
    return Description(
        description=f"imported: {boot.system.name or _printable(origin.name)}",
        hash=hash_inputs(facts),
        kernel_version=boot.version,
        cmdline=cmdline,
        memory=memory,
        console=None,
        disk=DiskImage(size=disk.size, sha256=disk.sha256, layout="partitioned" if boot.partitioned else "ext4")
        if disk
        else None,
        boot=boot.way,
        ready=ready,
        configuration=configuration,
        provenance=Provenance(
            source=_printable(f"{source}: {boot.found}" if source else boot.found), tools=read_versions() if disk else {}
        ),
    )


def _guess_memory(initrd: Path) -> Size:
    """For a root in an initramfs: twice its files and the archive itself, if packing makes a third of the files."""
    mb = -(-7 * initrd.stat().st_size >> 20)
    return Size(max(_MIN_RAM_ROOT, mb) << 20)


def _printable(text: str) -> str:
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in text)[:2048]


@contextmanager
def _workspace(store: Path) -> Iterator[Path]:
    """A private folder in the store's file system. Removes those of imports that were killed."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        with locked(store / ".import.lock", progress=lambda _: None):
            _remove_leftovers(sorted(store.glob(".import-*")))
            work = Path(mkdtemp(prefix=".import-", dir=store))
            lock = lock_file(work / "lock")
    except OSError as error:
        raise ImageError(f"cannot use the image store {store}: {error.strerror}", "run as root, or give --output DIR") from None
    try:
        yield work
    finally:
        remove_tree(work)
        os.close(lock)


def _remove_leftovers(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            lock = lock_file(folder / "lock")
        except OSError:  # in use
            continue
        remove_tree(folder)
        os.close(lock)
