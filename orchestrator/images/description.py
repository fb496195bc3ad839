"""``image.json``: what a build of a guest image consists of, and what a guest needs to boot it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from orchestrator.model.fields import check_size
from orchestrator.values import Size

FILE = "image.json"
CONSOLE_PROTOCOL = "nohype-1"

KERNEL, INITRD, RAM_INITRD, DISK = "vmlinuz", "initrd", "ram-initrd", "disk.raw"
"""Files of a build: the kernel; an initrd that mounts the root from the disk, or is the root itself; an initrd that is the root
for guests without a disk; the raw image for a guest's disk."""

_MAX_BYTES = 1 << 53  # JSON readers keep larger numbers as floating point


def _printable(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise ValueError("only printable ASCII on one line is allowed")
    return text


def _size(value: Any) -> Size:
    if isinstance(value, Size):
        return value
    if not isinstance(value, str):
        raise ValueError('not a text such as "96M"')
    return Size.parse(check_size(value))


_Line = Annotated[str, Field(max_length=2048), AfterValidator(_printable)]
_Bytes = Annotated[int, Field(ge=0, le=_MAX_BYTES)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Versions = Annotated[dict[_Line, _Line], Field(max_length=50_000)]
_Configuration = Literal["credentials", "cloud-init"]

Readiness = Literal["console", "notify", "cloud-init", "ssh"]


class _Part(BaseModel):
    # as in the whole: fields that a later version adds are ignored
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class DiskImage(_Part):
    """``disk.raw``: a file system on the whole disk, or partitions."""

    size: _Bytes
    sha256: _Sha256
    layout: Literal["ext4", "partitioned"]


class RamRoot(_Part):
    """``ram-initrd``: its size as a file, and the size of the files in it, both in bytes."""

    packed: _Bytes
    unpacked: _Bytes

    @property
    def min_memory(self) -> Size:
        """rootfs is a tmpfs of half the memory, and the kernel holds the packed file until it is unpacked."""
        return Size(2 * self.unpacked + self.packed)


class Provenance(_Part):
    """What a build was made from. None or an empty table: not known."""

    recipe: _Line | None = None
    packages: _Versions = {}
    lock: _Sha256 | None = None  # of the recipe's list of packages and their hashes
    tools: _Versions = {}
    source: _Line | None = None  # of an imported image: what the user named


class Description(_Part):
    """The content of ``image.json``. Values that libvirt would refuse are refused here, before anything is claimed."""

    description: str = ""
    hash: _Line  # of everything that the image was built from
    kernel_version: _Line
    cmdline: _Line
    # The minimum of a guest: with less, its kernel hangs without a message.
    memory: Annotated[Size, PlainValidator(_size), PlainSerializer(str)]
    console: _Line | None  # protocol that the image's init speaks on the console
    disk: DiskImage | None = None
    ram_root: RamRoot | None = None
    boot: Literal["direct", "firmware"] = "direct"  # with kernel and initrd of the build, or by SeaBIOS from the guest's disk
    ready: Readiness | None = None  # how its guests report that they are ready; None: not at all
    # a list in the file; the ways in which its guests can be configured
    configuration: Annotated[tuple[_Configuration, ...], Field(strict=False, max_length=2)] = ()
    provenance: Provenance | None = None

    @model_validator(mode="before")
    @classmethod
    def _derive_readiness(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "ready" not in fields and fields.get("console") == CONSOLE_PROTOCOL:
            return {**fields, "ready": "console"}
        return fields

    @model_validator(mode="after")
    def _check(self) -> Description:
        if self.boot == "firmware" and self.disk is None:
            raise ValueError("boot: firmware boots from a disk, and disk is null")
        if len(set(self.configuration)) != len(self.configuration):
            raise ValueError("configuration: contains a value twice")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """The files that a build with this description has, besides ``image.json``."""
        boots = (KERNEL, INITRD) if self.boot == "direct" else ()
        return (*boots, *((RAM_INITRD,) if self.ram_root else ()), *((DISK,) if self.disk else ()))


def write_description(folder: Path, description: Description) -> None:
    """Writes ``image.json``, the last file of an image."""
    fields = {"name": folder.name, **description.model_dump(mode="json")}
    (folder / FILE).write_text(json.dumps(fields, indent=2) + "\n")
