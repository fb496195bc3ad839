"""Reads specs of emulated servers from TOML files."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import RequestError
from orchestrator.model.fields import SizeField, describe
from orchestrator.values import CpuSet, Size

SHIPPED = Path(__file__).parent / "specs"
DEFAULT_SPEC = "numa"
PAGE = Size(2 << 20)
GIGANTIC_PAGE = Size(1 << 30)

# An Intel 82576 has 7 VFs per port in QEMU (hw/net/igb_core.h, IGB_MAX_VF_FUNCTIONS counts from 0).
_MAX_VFS = 7
# For kernel, libvirt, QEMU and manager in addition to the huge pages; with less, the OOM killer runs in the lab.
_MIN_FREE = Size(1536 << 20)
# A lab's name is part of the names of its network namespace, folder and socket (sun_path has 108 bytes).
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?", re.ASCII)


def parse_lab_name(text: str) -> str:
    if not is_lab_name(text):
        raise RequestError(f"{text!r} is not a lab name", "use 1 to 24 characters of a-z, 0-9 and inner hyphens")
    return text


def is_lab_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text))


class LabSpec(BaseModel):
    """An emulated server. Its huge pages are reserved at boot: later the kernel rarely finds a contiguous GB."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str  # not a field of the file
    sockets: Annotated[int, Field(ge=1, le=4)]
    cores: Annotated[int, Field(ge=1, le=16)]  # per socket
    threads: Annotated[int, Field(ge=1, le=2)]  # per core
    nodes: Annotated[int, Field(ge=1, le=4)] = 1  # sockets and memory are divided evenly between NUMA nodes
    memory: SizeField
    hugepages_per_node: Annotated[int, Field(ge=0, le=1 << 16)]  # of 2 MB
    gigantic_pages: Annotated[int, Field(ge=0, le=1 << 7)] = 0  # of 1 GB, on all nodes together
    vfs: Annotated[int, Field(ge=0, le=_MAX_VFS)] = _MAX_VFS  # 0 omits the NIC
    disks: Annotated[tuple[SizeField, ...], Field(max_length=8, strict=False)] = ()  # NVMe, each with its own controller

    plain: bool = False  # without the host role; boots from its own disk, and can reboot
    tpm: bool = False  # a TPM 2.0, emulated by swtpm

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cpus < 2 * self.threads:
            raise ValueError("sockets, cores: at least 2 cores are required, one of them for housekeeping")
        if self.sockets % self.nodes:
            raise ValueError(f"nodes: {self.sockets} sockets cannot be divided evenly between {self.nodes} NUMA nodes")
        if self.size.bytes % (self.nodes * PAGE.bytes):
            raise ValueError(f"memory: {self.memory} cannot be divided evenly between {self.nodes} NUMA nodes in 2M pages")
        free = self.size.bytes - sum(size.bytes * count for size, count in self.page_pools.items())
        if free < _MIN_FREE.bytes:
            raise ValueError(
                f"hugepages_per_node, gigantic_pages: the huge pages leave {max(free, 0) >> 20}M of {self.memory},"
                f" the host needs {_MIN_FREE.bytes >> 20}M"
            )
        return self

    @property
    def size(self) -> Size:
        return Size.parse(self.memory)

    @property
    def node_memory(self) -> Size:
        return Size(self.size.bytes // self.nodes)

    @property
    def page_pools(self) -> dict[Size, int]:
        """The number of huge pages by size, on all nodes together."""
        return {PAGE: self.nodes * self.hugepages_per_node, GIGANTIC_PAGE: self.gigantic_pages}

    @property
    def cpus(self) -> int:
        return self.sockets * self.cores * self.threads

    @property
    def housekeeping(self) -> CpuSet:
        # The first physical core: QEMU numbers the threads of a core consecutively.
        return CpuSet.of(range(self.threads))

    @property
    def guest_cpus(self) -> CpuSet:
        return CpuSet.of(range(self.threads, self.cpus))

    def node_cpus(self, node: int) -> CpuSet:
        each = self.cpus // self.nodes
        return CpuSet.of(range(node * each, (node + 1) * each))


@dataclass(frozen=True)
class LabImage:
    kernel: Path
    initrd: Path
    root: Path  # raw image; labs never write to it
    cmdline: str  # words of the host role for the kernel command line of any NoHype host


def load_spec(spec: str, folder: Path = Path()) -> LabSpec:
    """Reads a shipped spec by name, or a file: a text with a slash or with the ending .toml is a path, relative to ``folder``."""
    is_file = "/" in spec or spec.endswith(".toml")
    path = folder / spec if is_file else SHIPPED / f"{spec}.toml"
    try:
        text = path.read_text()
    except FileNotFoundError:
        hint = f"use a shipped spec ({', '.join(shipped_specs())}) or the path of a TOML file"
        raise RequestError(f"no lab spec named {spec!r}", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the lab spec {path}: {error}") from None
    return parse_spec(text, name=path.stem, source=str(path) if is_file else spec)


def parse_spec(text: str, *, name: str, source: str) -> LabSpec:
    """``source`` names the text in error messages."""
    try:
        fields = tomllib.loads(text)
        if "name" in fields:
            raise RequestError(f"invalid lab spec {source}: name: the spec is named after its file")
        return LabSpec.model_validate({"name": parse_lab_name(name), **fields})
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"lab spec {source} is not valid TOML: {error}") from None
    except ValidationError as error:
        raise RequestError(f"invalid lab spec {source}: {describe(error).removeprefix(': ')}") from None


def shipped_specs() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))
