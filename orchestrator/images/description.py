"""``image.json``: what a build of a guest image consists of, and what a guest needs to boot it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from orchestrator.model.fields import check_size
from orchestrator.model.target import Transport
from orchestrator.values import Size

FILE = "image.json"
CONSOLE_PROTOCOL = "nohype-1"

KERNEL, INITRD, RAM_INITRD, DISK = "vmlinuz", "initrd", "ram-initrd", "disk.raw"
"""Files of a build: the kernel; an initrd that mounts the root from the disk, or is the root itself; an initrd that is the root
for guests without a disk; the raw image for a guest's disk."""

_KERNEL = 60 << 20  # bytes
_PAGE = 2 << 20  # guests get whole huge pages
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
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
_Versions = Annotated[dict[_Line, _Line], Field(max_length=50_000)]
_Transport = Annotated[Transport, Field(strict=False)]
_Configuration = Literal["credentials", "cloud-init"]

Readiness = Literal["console", "notify", "cloud-init", "ssh"]


class _Part(BaseModel):
    # as in the whole: fields that a later version adds are ignored
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class FileRecord(_Part):
    """A file of an installed build; size in bytes."""

    size: _Bytes
    sha256: _Sha256


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
        """What the kernel needs to unpack the file: rootfs is a tmpfs of half the memory that is left beside the packed file
        and the kernel (60 MB and 1/64 of the memory; Linux 6.12). With less it reports "unpacking failed" and goes on.
        """
        files = 2 * self.unpacked + self.packed
        return Size(-(-(files + _KERNEL) * 64 // 63 // _PAGE) * _PAGE)


class Provenance(_Part):
    """What a build was made from. None or an empty table: not known."""

    recipe: _Line | None = None
    packages: _Versions = {}
    lock: _Sha256 | None = None  # of the recipe's list of packages and their hashes
    tools: _Versions = {}
    source: _Line | None = None  # of an imported image: what the user named


Bios = Literal["seabios", "qboot"]
"""qboot starts the given kernel and does little else: some 2,000 VM exits less, but no SMBIOS tables (systemd's credentials, and
its machine-id from the UUID) and no option ROMs. On hosts that cannot use it (see ``host.firmware``) SeaBIOS starts the guest.
"""


class Description(_Part):
    """The content of ``image.json``. Values that libvirt would refuse are refused here, before anything is claimed."""

    description: str = ""
    hash: _Line  # of an installed build: `hash_content`; before that, of what the build was made from
    kernel_version: _Line
    cmdline: _Line
    # The minimum of a guest: with less, its kernel hangs without a message.
    memory: Annotated[Size, PlainValidator(_size), PlainSerializer(str)]
    console: _Line | None  # protocol that the image's init speaks on the console
    disk: DiskImage | None = None
    ram_root: RamRoot | None = None
    boot: Literal["direct", "firmware"] = "direct"  # with kernel and initrd of the build, or by SeaBIOS from the guest's disk
    bios: Bios = "seabios"  # of guests that boot directly
    ready: Readiness | None = None  # how its guests report that they are ready; None: not at all
    disengages: bool = False  # its guests call when their boot is over
    # a list in the file; the ways in which its guests can be configured
    configuration: Annotated[tuple[_Configuration, ...], Field(strict=False, max_length=2)] = ()
    # a list in the file; how its initrd can mount the root from a network disk
    network_root: Annotated[tuple[_Transport, ...], Field(strict=False, max_length=len(Transport))] = ()
    provenance: Provenance | None = None
    # Written when the build is installed; empty for a build that an earlier version installed.
    files: Annotated[dict[_FileName, FileRecord], Field(max_length=100)] = {}

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
    def required_files(self) -> tuple[str, ...]:
        """The files that a build with this description has, besides ``image.json``."""
        boots = (KERNEL, INITRD) if self.boot == "direct" else ()
        return (*boots, *((RAM_INITRD,) if self.ram_root else ()), *((DISK,) if self.disk else ()))


def hash_content(fields: Mapping[str, Any]) -> str:
    """The SHA-256 that names a build: of the fields of its ``image.json`` except ``hash``, with the SHA-256 of each file."""
    content = {name: value for name, value in fields.items() if name != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_description(folder: Path, description: Description) -> None:
    """Writes ``image.json``, the last file of an image."""
    (folder / FILE).write_text(json.dumps(description.model_dump(mode="json"), indent=2) + "\n")
