"""The store of built guest images, as the system manager reads it.

    STORE/NAME -> .builds/HASH        a name is a link to a build; the link is replaced as one operation
    STORE/.builds/HASH/image.json     a build, which never changes; HASH is `description.hash_content`
    STORE/NAME/image.json             a build that an earlier version installed: a folder instead of a link

So a guest can start the build that it was claimed with after the name points to a newer one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path

from pydantic import ValidationError

from orchestrator.errors import Conflict, ImageError, NotFound
from orchestrator.images.description import (
    CONSOLE_PROTOCOL,
    DISK,
    FILE,
    INITRD,
    KERNEL,
    RAM_INITRD,
    Description,
    hash_content,
)
from orchestrator.images.sparse import open_regular
from orchestrator.model.fields import describe
from orchestrator.model.plan import ImageRef
from orchestrator.values import Size

STORE = Path("/var/lib/nohype/images")
BUILDS = ".builds"

_PART = 64 << 10
_MAX_DESCRIPTION = 4 << 20  # bytes; the packages of a large image are 100 KB
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


class Image(Description):
    """A built guest image and its folder."""

    folder: Path
    alias: str | None = None  # the name by which it was found; None: the folder's

    @property
    def name(self) -> str:
        return self.alias or self.folder.name

    @property
    def kernel(self) -> Path:
        return self.folder / KERNEL

    @property
    def initrd(self) -> Path:
        return self.folder / INITRD

    @property
    def ram_initrd(self) -> Path:
        return self.folder / RAM_INITRD

    @property
    def disk_file(self) -> Path:
        return self.folder / DISK

    def choose_initrd(self, *, has_disk: bool) -> Path:
        """The initrd of a guest with or without a disk. The minimum of its memory is that of ``min_memory``."""
        return self.ram_initrd if self.ram_root and not has_disk else self.initrd

    def min_memory(self, *, has_disk: bool) -> Size:
        if not self.ram_root or has_disk:
            return self.memory
        return Size(max(self.memory.bytes, self.ram_root.min_memory.bytes))

    @property
    def speaks_protocol(self) -> bool:
        """Whether its guests report ready and execute commands on their console."""
        return self.console == CONSOLE_PROTOCOL

    def to_json(self, *, full: bool = False) -> dict[str, object]:
        """For users; ``memory`` in bytes. ``full``: with provenance and files, which are long."""
        direct = self.boot == "direct"
        files = {
            "name": self.name,
            "kernel": str(self.kernel) if direct else None,
            "initrd": str(self.initrd) if direct else None,
        }
        hidden = {"folder", "alias"} | (set() if full else {"description", "provenance", "files"})
        return {**files, **self.model_dump(mode="json", exclude=hidden), "memory": self.memory.bytes}


def find_image(store: Path, name: str) -> Image:
    """Raises NotFound if there is no such image, and ImageError if its folder is damaged."""
    if not _FOLDER_NAME.fullmatch(name) or not is_name(store / name):
        available = f"available: {', '.join(image_names(store)) or 'none'}"
        raise NotFound(f"no guest image {name!r} in {store}; {available}", f"build it with `nohype image build {name}`")
    return read_image(resolve(store, name), name)


def find_build(store: Path, ref: ImageRef) -> Image:
    """The build that a guest was created with, also if the name has another build now, or was deleted.

    Raises:
        NotFound: the store has neither the build nor the name. A tenant may see the message.
        ImageError: as ``find_image``.
        Conflict: the store does not have this build any more.
    """
    if ref.hash and is_folder(build := build_folder(store, ref.hash)):
        return read_image(build, ref.name)
    try:
        image = find_image(store, ref.name)
    except NotFound:
        hint = "install the image again, or delete the guest"
        raise NotFound(f"the image {ref.name}, which the guest was created with, does not exist", hint) from None
    if ref.hash not in ("", image.hash):
        raise Conflict(
            f"image {ref.name} has changed since the guest was created: build {image.hash[:12]}, expected {ref.hash[:12]}",
            "delete the guest and create it again, or install the earlier build",
        )
    return image


def list_images(store: Path) -> tuple[tuple[Image, ...], tuple[ImageError, ...]]:
    """The images by name, and what is wrong with the damaged ones."""
    images, damaged = [], []
    for name in image_names(store):
        try:
            images.append(read_image(resolve(store, name), name))
        except ImageError as error:
            damaged.append(error)
    return tuple(images), tuple(damaged)


def image_names(store: Path) -> tuple[str, ...]:
    """The names of the images, sorted; () if there is no store. A link to a build that does not exist is a damaged image."""
    if not store.is_dir():
        return ()
    # a store with a file system of its own has the folder lost+found
    return tuple(sorted(path.name for path in store.iterdir() if _FOLDER_NAME.fullmatch(path.name) and is_name(path)))


def is_name(path: Path) -> bool:
    """A link of the store, or a folder."""
    return link_target(path) is not None or path.is_dir()


def link_target(path: Path) -> str | None:
    """The folder name of the build that a name links to. None for everything else: a link that this program did not make, too."""
    try:
        folder, _, name = os.readlink(path).rpartition("/")
    except OSError:
        return None
    return name if folder == BUILDS and _FOLDER_NAME.fullmatch(name) else None


def resolve(store: Path, name: str) -> Path:
    """The folder of the build that a name has now."""
    target = link_target(store / name)
    return store / name if target is None else store / BUILDS / target


def build_folder(store: Path, build: str) -> Path:
    """Earlier versions did not restrict the hash in ``image.json``; it can be no name of a folder."""
    safe = build if _FOLDER_NAME.fullmatch(build) else hashlib.sha256(build.encode()).hexdigest()
    return store / BUILDS / safe


def list_builds(store: Path) -> tuple[str, ...]:
    """Folder names of the builds, sorted, also of those that no name links to."""
    try:
        return tuple(sorted(entry.name for entry in os.scandir(store / BUILDS) if not entry.name.startswith(".")))
    except (FileNotFoundError, NotADirectoryError):
        return ()


def is_folder(path: Path) -> bool:
    """Not a link."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def read_image(folder: Path, name: str | None = None) -> Image:
    """``name`` is for messages, and becomes the image's; None: the folder's. Raises ImageError if the folder is damaged."""
    damaged, hint = f"guest image {name or folder.name} is damaged", _rebuild(folder, name or folder.name)
    if folder.parent.name == BUILDS and folder.is_symlink():
        raise ImageError(f"{damaged}: the folder of its build is a link", hint)
    description = _read_description(folder, damaged, hint)
    problems = [text for file in description.required_files if (text := _find_damage(folder / file, description))]
    if problems:
        raise ImageError(f"{damaged}: {', '.join(problems)}", hint)
    return Image(folder=folder, alias=name, **dict(description))


def _read_description(folder: Path, damaged: str, hint: str) -> Description:
    if problem := _find_damage(folder / FILE, None):
        raise ImageError(f"{damaged}: {problem}", hint)
    try:
        return Description.model_validate_json(_read_file(folder / FILE, damaged, hint))
    except ValidationError as error:
        raise ImageError(f"{damaged}: {FILE}: {describe(error).removeprefix(': ')}", hint) from None


def read_content_hash(folder: Path) -> str:
    """`hash_content` of the file as it is now, with fields that this version does not know. Raises ImageError."""
    damaged = f"the build in {folder} is damaged"
    try:
        return hash_content(json.loads(_read_file(folder / FILE, damaged, "")))
    except (ValueError, RecursionError, AttributeError):
        raise ImageError(f"{damaged}: {FILE}: not a JSON object") from None


def _read_file(path: Path, damaged: str, hint: str) -> bytes:
    try:
        # In parts: the memory for one read of the maximum would be mapped and unmapped for each request.
        content = b""
        with open_regular(path) as descriptor:
            while len(content) <= _MAX_DESCRIPTION and (part := os.read(descriptor, _PART)):
                content += part
    except OSError as error:
        raise ImageError(f"{damaged}: {FILE}: {error.strerror}", hint) from None
    if len(content) > _MAX_DESCRIPTION:
        raise ImageError(f"{damaged}: {FILE}: more than {_MAX_DESCRIPTION} bytes", hint)
    return content


def _find_damage(path: Path, description: Description | None) -> str:
    """What a look without reading the content shows; empty if nothing."""
    try:
        found = path.lstat()
    except OSError:
        return f"missing {path.name}"
    if not stat.S_ISREG(found.st_mode):
        return f"{path.name} is not a regular file"
    record = description.files.get(path.name) if description else None
    if record and found.st_size != record.size:
        return f"{path.name} has {found.st_size} bytes, expected {record.size}"
    return ""


def _rebuild(folder: Path, name: str) -> str:
    store = folder.parent.parent if folder.parent.name == BUILDS else folder.parent
    return f"rebuild it with `nohype image build {name}{'' if store == STORE else f' --output {store}'}`"
