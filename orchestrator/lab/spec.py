"""What an emulated server is made of, read from a TOML file. Pure but for reading that file."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import RequestError
from orchestrator.model.request import as_value_error, describe
from orchestrator.values import CpuSet, Size

SHIPPED = Path(__file__).parent / "specs"
DEFAULT_SPEC = "numa"
PAGE = Size(2 << 20)
GIGANTIC_PAGE = Size(1 << 30)

# An Intel 82576 has 7 VFs a port in QEMU (hw/net/igb_core.h, IGB_MAX_VF_FUNCTIONS counts from 0).
_MOST_VFS = 7
# The kernel, libvirt, QEMU and the manager beside the huge pages; a lab with less is killed by its own OOM killer.
_LEAST_FREE = Size(1536 << 20)
# A lab's name becomes part of a network namespace's name, and of folder and socket names (sun_path has 108 bytes).
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?", re.ASCII)


def _size(text: str) -> str:
    return as_value_error(lambda: str(Size.parse(text)))


_Size = Annotated[str, AfterValidator(_size)]


def parse_lab_name(text: str) -> str:
    """Checks a lab's name: 1 to 24 of a-z, 0-9 and inner hyphens.

    Raises:
        RequestError: the name is not of that form.
    """
    if not is_lab_name(text):
        raise RequestError(f"{text!r} is not a lab name", "use 1 to 24 of a-z, 0-9 and, inside, hyphens")
    return text


def is_lab_name(text: str) -> bool:
    """Whether the text has the form of a lab's name."""
    return bool(_NAME.fullmatch(text))


class LabSpec(BaseModel):
    """An emulated server.

    Attributes:
        name: what the spec is called; set by ``load_spec``, not a field of the file.
        sockets: number of CPU sockets.
        cores: cores a socket.
        threads: SMT threads a core.
        nodes: NUMA nodes; sockets are spread over them evenly.
        memory: all of the server's memory; spread over the nodes evenly.
        hugepages_per_node: 2 MB pages that are reserved at boot on each node.
        gigantic_pages: 1 GB pages, also reserved at boot: later the kernel seldom finds a GB in one piece.
        vfs: virtual functions of the NIC (an Intel 82576, which has 7) that the host may use; 0 leaves the NIC out.
        disks: sizes of NVMe disks, each with a controller of its own.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    sockets: Annotated[int, Field(ge=1, le=4)]
    cores: Annotated[int, Field(ge=1, le=16)]
    threads: Annotated[int, Field(ge=1, le=2)]
    nodes: Annotated[int, Field(ge=1, le=4)] = 1
    memory: _Size
    hugepages_per_node: Annotated[int, Field(ge=0, le=1 << 16)]
    gigantic_pages: Annotated[int, Field(ge=0, le=1 << 7)] = 0
    vfs: Annotated[int, Field(ge=0, le=_MOST_VFS)] = _MOST_VFS
    disks: Annotated[tuple[_Size, ...], Field(max_length=8, strict=False)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cpus < 2 * self.threads:
            raise ValueError("sockets, cores: one core is for the host's own work, so a lab needs at least two cores")
        if self.sockets % self.nodes:
            raise ValueError(f"nodes: {self.sockets} sockets cannot be spread evenly over {self.nodes} NUMA nodes")
        if self.size.bytes % (self.nodes * PAGE.bytes):
            raise ValueError(f"memory: {self.memory} cannot be spread evenly over {self.nodes} NUMA nodes in 2M pages")
        huge = self.nodes * self.hugepages_per_node * PAGE.bytes + self.gigantic_pages * GIGANTIC_PAGE.bytes
        free = self.size.bytes - huge
        if free < _LEAST_FREE.bytes:
            raise ValueError(
                f"hugepages_per_node, gigantic_pages: of {self.memory} only {max(free, 0) >> 20}M would be left beside"
                f" the huge pages; the host needs {_LEAST_FREE.bytes >> 20}M"
            )
        return self

    @property
    def size(self) -> Size:
        """All of the memory as a value."""
        return Size.parse(self.memory)

    @property
    def node_memory(self) -> Size:
        """Memory of one NUMA node."""
        return Size(self.size.bytes // self.nodes)

    @property
    def cpus(self) -> int:
        """Number of logical CPUs."""
        return self.sockets * self.cores * self.threads

    @property
    def housekeeping(self) -> CpuSet:
        """The first physical core: QEMU numbers the threads of a core one after the other."""
        return CpuSet.of(range(self.threads))

    @property
    def guest_cpus(self) -> CpuSet:
        """All CPUs that are not for housekeeping."""
        return CpuSet.of(range(self.threads, self.cpus))

    def node_cpus(self, node: int) -> CpuSet:
        """The CPUs of a NUMA node."""
        each = self.cpus // self.nodes
        return CpuSet.of(range(node * each, (node + 1) * each))


@dataclass(frozen=True)
class LabImage:
    """What a lab boots from.

    Attributes:
        kernel, initrd: files for QEMU's direct kernel boot.
        root: raw image of the root file system; labs never write to it.
        cmdline: the words that the host role wants on the kernel command line of any NoHype host.
    """

    kernel: Path
    initrd: Path
    root: Path
    cmdline: str


def load_spec(wanted: str) -> LabSpec:
    """Reads a shipped spec by its name, or a file.

    Args:
        wanted: ``small``, ``numa``, or the path of a TOML file (anything with a slash or ending in .toml).

    Raises:
        RequestError: no such spec, no TOML, or wrong fields, each named.
    """
    is_file = "/" in wanted or wanted.endswith(".toml")
    path = Path(wanted) if is_file else SHIPPED / f"{wanted}.toml"
    try:
        text = path.read_text()
    except FileNotFoundError:
        hint = f"shipped are: {', '.join(shipped_specs())}; or give the path of a TOML file"
        raise RequestError(f"there is no lab spec {wanted!r}", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the lab spec {path}: {error}") from None
    return parse_spec(text, name=path.stem, source=str(path) if is_file else wanted)


def parse_spec(text: str, *, name: str, source: str) -> LabSpec:
    """Reads a spec from TOML text.

    Args:
        name: what the spec is called.
        source: file or name for error messages.

    Raises:
        RequestError: no TOML, or wrong fields, each named.
    """
    try:
        fields = tomllib.loads(text)
        if "name" in fields:
            raise RequestError(f"the lab spec {source} is wrong: name: the file's own name is the spec's name")
        return LabSpec.model_validate({"name": parse_lab_name(name), **fields})
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"the lab spec {source} is not TOML: {error}") from None
    except ValidationError as error:
        raise RequestError(f"the lab spec {source} is wrong: {describe(error).removeprefix(': ')}") from None


def shipped_specs() -> tuple[str, ...]:
    """Names of the specs that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))
