"""The store of built guest images, one folder per image. The system manager starts guests from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp

from pydantic import ValidationError

from orchestrator.errors import Conflict, ImageError, NotFound
from orchestrator.images.cache import locked, remove_tree
from orchestrator.images.description import CONSOLE_PROTOCOL, DISK, FILE, INITRD, KERNEL, RAM_INITRD, Description
from orchestrator.model.fields import describe
from orchestrator.model.plan import ImageRef

STORE = Path("/var/lib/nohype/images")


class Image(Description):
    """A built guest image and its folder, which is named after it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

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

    @property
    def speaks_protocol(self) -> bool:
        """Whether its guests report ready and execute commands on their console."""
        return self.console == CONSOLE_PROTOCOL

    def to_json(self) -> dict[str, object]:
        """For users; ``memory`` in bytes."""
        files = {"name": self.name, "kernel": str(self.kernel), "initrd": str(self.initrd)}
        return {**files, **self.model_dump(exclude={"folder", "description"}), "memory": self.memory.bytes}


def find_image(store: Path, name: str) -> Image:
    """Raises NotFound if there is no such image, and ImageError if its folder is damaged."""
    names = image_names(store)
    if name not in names:
        available = f"available: {', '.join(names) or 'none'}"
        raise NotFound(f"no guest image {name!r} in {store}; {available}", f"build it with `nohype image build {name}`")
    return read_image(store / name)


def find_build(store: Path, ref: ImageRef) -> Image:
    """The image, if it is the build that a guest was created with.

    Raises:
        NotFound, ImageError: as ``find_image``.
        Conflict: the image was built anew since.
    """
    image = find_image(store, ref.name)
    if ref.hash not in ("", image.hash):
        raise Conflict(
            f"image {ref.name} has changed since the guest was created: build {image.hash[:12]}, expected {ref.hash[:12]}",
            "delete the guest and create it again, or install the earlier build",
        )
    return image


def list_images(store: Path) -> tuple[Image, ...]:
    return tuple(read_image(store / name) for name in image_names(store))


def image_names(store: Path) -> tuple[str, ...]:
    """The names of the images, sorted; () if there is no store."""
    if not store.is_dir():
        return ()
    return tuple(sorted(path.name for path in store.iterdir() if not path.name.startswith(".") and path.is_dir()))


def read_image(folder: Path) -> Image:
    """Raises ImageError if the folder is damaged."""
    damaged = f"guest image {folder.name} is damaged"
    if not (folder / FILE).is_file():
        raise ImageError(f"{damaged}: missing {FILE}", _rebuild(folder))
    try:
        description = Description.model_validate_json((folder / FILE).read_bytes())
    except OSError as error:
        raise ImageError(f"{damaged}: {FILE}: {error.strerror}", _rebuild(folder)) from None
    except ValidationError as error:
        raise ImageError(f"{damaged}: {FILE}: {describe(error).removeprefix(': ')}", _rebuild(folder)) from None
    if missing := [name for name in description.files if not (folder / name).is_file()]:
        raise ImageError(f"{damaged}: missing {', '.join(missing)}", _rebuild(folder))
    return Image(folder=folder, **dict(description))


def install_image(built: Path, store: Path, name: str) -> Image:
    """Copies a built image into the store and replaces one of the same name. The store never contains half an image.

    Running guests are not affected: QEMU reads kernel and initrd only when a guest starts.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        with locked(store / ".lock", progress=lambda _: None):
            for leftover in store.glob(".tmp-*"):
                remove_tree(leftover)
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
            f"cannot install the guest image in {store}: {error.strerror or error}", "run as root, or give --output DIR"
        ) from None
    return read_image(store / name)


def _rebuild(folder: Path) -> str:
    store = "" if folder.parent == STORE else f" --output {folder.parent}"
    return f"rebuild it with `nohype image build {folder.name}{store}`"
