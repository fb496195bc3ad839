"""The daemon's configuration, /etc/nohype/nohype.toml. The host role of Ansible writes it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import RequestError
from orchestrator.request import as_value_error, describe
from orchestrator.values import DEFAULT_SOCKET, CpuSet, Size

DEFAULT_CONFIG = Path("/etc/nohype/nohype.toml")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _cpus(text: str) -> str:
    if not as_value_error(lambda: str(CpuSet.parse(text))):
        raise ValueError("no CPU is left for housekeeping")
    return text


def _size(text: str) -> str:
    return as_value_error(lambda: str(Size.parse(text)))


class HostConfig(_Strict):
    """How the host is divided.

    Attributes:
        housekeeping: CPU list for the manager, the kernel's threads and QEMU's helper threads; whole physical cores.
        uplinks: network interfaces whose virtual functions may be given to guests.
        page_size: huge page size that guests get.
        vfs_per_uplink: how many virtual functions to make on an uplink; left out: as many as it can have.
    """

    housekeeping: Annotated[str, AfterValidator(_cpus)]
    uplinks: tuple[str, ...] = Field(min_length=1, strict=False)
    page_size: Annotated[str, AfterValidator(_size)] = "2M"
    vfs_per_uplink: Annotated[int, Field(ge=1)] | None = None

    @property
    def housekeeping_cpus(self) -> CpuSet:
        """The housekeeping CPUs as a value."""
        return CpuSet.parse(self.housekeeping)

    @property
    def page(self) -> Size:
        """The page size as a value."""
        return Size.parse(self.page_size)


class PathConfig(_Strict):
    """Where things are kept."""

    images: str = "/var/lib/nohype/images"
    ledger: str = "/var/lib/nohype/ledger.sqlite"
    consoles: str = "/var/log/nohype/guests"
    socket: str = str(DEFAULT_SOCKET)


class ExitConfig(_Strict):
    """Bounds of the ``exits`` proof, per vCPU and second, for a guest that has booted and is idle or computes.

    Attributes:
        total: all VM exits.
        emulated: exits that QEMU or KVM's emulator had to serve (port I/O and memory-mapped I/O).
    """

    total: Annotated[float, Field(gt=0, strict=False)] = 2000.0
    emulated: Annotated[float, Field(gt=0, strict=False)] = 10.0


class DaemonConfig(_Strict):
    """The whole file."""

    host: HostConfig
    paths: PathConfig = PathConfig()
    exits: ExitConfig = ExitConfig()


def read_config(path: Path) -> DaemonConfig:
    """Reads the daemon's configuration.

    Raises:
        RequestError: no such file, no TOML, or a wrong field; with the file's name and the field's path.
    """
    try:
        return DaemonConfig.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise RequestError(f"cannot read the configuration {path}: {error.strerror}", "the Ansible host role writes it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the configuration {path} is not TOML: {error}") from None
    except ValidationError as error:
        raise RequestError(f"the configuration {path} is wrong: {describe(error)}") from None
