"""The folder of built guest images that the system manager starts guests from: one folder an image."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import ImageError, NotFound
from orchestrator.images.cache import locked, remove_tree
from orchestrator.model.request import as_value_error, describe
from orchestrator.values import Size

STORE = Path("/var/lib/nohype/images")

_DESCRIPTION = "image.json"


def _printable(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise ValueError("this is printable ASCII on one line")
    return text


_Line = Annotated[str, Field(max_length=2048), AfterValidator(_printable)]


class _Description(BaseModel):
    """``image.json``, of which libvirt gets the command line: what it could not take is found before anything is claimed."""

    model_config = ConfigDict(strict=True, extra="ignore")

    cmdline: _Line
    memory: Annotated[str, AfterValidator(lambda text: as_value_error(lambda: str(Size.parse(text))))]
    console: _Line | None
    kernel_version: _Line
    hash: _Line


@dataclass(frozen=True)
class Image:
    """A built guest image.

    Attributes:
        kernel, initrd: files that QEMU loads.
        cmdline: words for the kernel command line that the image wants.
        memory: the least that a guest of it starts with; with less, its kernel hangs before it can say so.
        console: protocol that the image speaks on its console ("nohype-1"), None if it speaks none.
        kernel_version: release of its kernel, for reports.
        hash: hash of what it was built from.
    """

    name: str
    kernel: Path
    initrd: Path
    cmdline: str
    memory: Size
    console: str | None
    kernel_version: str = ""
    hash: str = ""


def find_image(store: Path, name: str) -> Image:
    """The image of that name.

    Raises:
        NotFound: there is none; with the names that there are and how to build one.
        ImageError: its folder is damaged.
    """
    names = image_names(store)
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "there are none"
        raise NotFound(f"there is no guest image {name!r} in {store}: {there}", f"`nohype image build {name}` builds one")
    return read_image(store / name)


def list_images(store: Path) -> tuple[Image, ...]:
    """All images in the store, by name; damaged ones are an error.

    Raises:
        ImageError: a folder is damaged.
    """
    return tuple(read_image(store / name) for name in image_names(store))


def image_names(store: Path) -> tuple[str, ...]:
    """The names of the images in the store, sorted."""
    if not store.is_dir():
        return ()
    return tuple(sorted(path.name for path in store.iterdir() if not path.name.startswith(".") and path.is_dir()))


def read_image(folder: Path) -> Image:
    """Reads the image that a folder holds.

    Raises:
        ImageError: the folder is damaged.
    """
    damaged = f"the guest image {folder.name} is damaged"
    missing = [name for name in (_DESCRIPTION, "vmlinuz", "initrd") if not (folder / name).is_file()]
    if missing:
        raise ImageError(f"{damaged}: {', '.join(missing)} missing", _rebuild(folder))
    try:
        found = _Description.model_validate_json((folder / _DESCRIPTION).read_bytes())
    except OSError as error:
        raise ImageError(f"{damaged}: {_DESCRIPTION}: {error.strerror}", _rebuild(folder)) from None
    except ValidationError as error:
        raise ImageError(f"{damaged}: {_DESCRIPTION}: {describe(error).removeprefix(': ')}", _rebuild(folder)) from None
    return Image(
        folder.name,
        folder / "vmlinuz",
        folder / "initrd",
        found.cmdline,
        Size.parse(found.memory),
        found.console,
        found.kernel_version,
        found.hash,
    )


def write_description(
    folder: Path, *, cmdline: str, memory: str, console: str | None, kernel_version: str, hash: str, description: str
) -> None:
    """Writes ``image.json``, the last file of an image."""
    fields = {
        "name": folder.name, "description": description, "hash": hash, "kernel_version": kernel_version,
        "cmdline": cmdline, "memory": memory, "console": console,
    }  # fmt: skip
    (folder / _DESCRIPTION).write_text(json.dumps(fields, indent=2) + "\n")


def install_image(built: Path, store: Path, name: str) -> Image:
    """Copies a built image into the store, in place of one of the same name. The store never holds half an image.

    Guests that run are not touched: QEMU has read kernel and initrd when a guest starts.

    Raises:
        ImageError: the store cannot be written.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        with locked(store / ".lock", progress=lambda _: None):
            for left_over in store.glob(".tmp-*"):
                remove_tree(left_over)
            temporary = Path(mkdtemp(prefix=".tmp-", dir=store))
            try:
                shutil.copytree(built, temporary / name)
                if (store / name).exists():
                    (store / name).rename(temporary / "old")
                (temporary / name).rename(store / name)
            finally:
                remove_tree(temporary)
    except OSError as error:
        raise ImageError(
            f"cannot put the guest image into {store}: {error.strerror or error}", "run as root, or give --output DIR"
        ) from None
    return read_image(store / name)


def _rebuild(folder: Path) -> str:
    where = "" if folder.parent == STORE else f" --output {folder.parent}"
    return f"`nohype image build {folder.name}{where}` builds it again"
