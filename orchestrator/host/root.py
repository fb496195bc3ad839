"""The only opener of /sys, /proc, cgroupfs and tracefs. The root is a value, so tests and containers can give another one.

Names are relative (``sys/devices/system/cpu/online``), so that nothing escapes a fake root by being absolute.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path

from orchestrator.errors import HostError

_HINTS = {
    1: "run as root; in a container the file may be masked",
    13: "run as root",
    2: "the kernel or the device does not offer this; `nohype survey` shows what is there",
    16: "something else uses it",
}


@dataclass(frozen=True)
class HostRoot:
    """A host's pseudo file systems below one folder.

    All methods raise HostError with the file's name and the kernel's errno.
    """

    path: Path = Path("/")

    def read(self, name: str) -> str:
        """The file's text without surrounding white space."""
        return self.read_bytes(name).decode(errors="replace").strip()

    def read_bytes(self, name: str) -> bytes:
        """The file's bytes; for files with NULs, such as /proc/PID/cmdline."""
        try:
            # Not through pathlib: a survey reads a thousand files, and in the emulated lab each Path costs a millisecond.
            with open(f"{self.path}/{name}", "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            raise _host_error("cannot read", name, error) from None

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` on; for binary files such as /proc/PID/pagemap."""
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY)
            try:
                found = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _host_error("cannot read", name, error) from None
        if len(found) != length:
            raise HostError(f"/{name} ends at offset {offset + len(found)}; {length} bytes from {offset} on were wanted")
        return found

    def find(self, name: str) -> str | None:
        """The file's text, or None if there is no such file. Forbidden is an error, not absent."""
        try:
            return self.read(name)
        except HostError as error:
            if error.errno == ENOENT:
                return None
            raise

    def write(self, name: str, value: str) -> None:
        """Writes the value in one write(2), which sysfs takes as one request. Creates nothing.

        Does not read back: some files are write-only. The function that knows the file does that.
        """
        try:
            descriptor = os.open(self.path / name, os.O_WRONLY)
            try:
                os.write(descriptor, value.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _host_error(f"cannot write {value!r} to", name, error) from None

    def exists(self, name: str) -> bool:
        """Whether the name is there (symbolic links followed)."""
        return (self.path / name).exists()

    def link(self, name: str) -> str | None:
        """The last part of a symbolic link's target (``driver`` -> "vfio-pci"), or None if there is no such link."""
        try:
            return os.path.basename(os.readlink(self.path / name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _host_error("cannot read the link", name, error) from None

    def target(self, name: str) -> str | None:
        """The whole text of a symbolic link (``fd/21`` -> "/dev/vfio/9"), or None if there is no such link."""
        try:
            return os.readlink(self.path / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _host_error("cannot read the link", name, error) from None

    def names(self, name: str) -> tuple[str, ...]:
        """The names in a folder, sorted."""
        try:
            return tuple(sorted(os.listdir(f"{self.path}/{name}")))
        except OSError as error:
            raise _host_error("cannot list", name, error) from None

    def read32(self, name: str, offset: int) -> int:
        """A little-endian 32 bit device register through a PCI ``resourceN`` file; offset in bytes."""
        with _Registers(self.path / name, name) as registers:
            return int(struct.unpack_from("<I", registers, offset)[0])

    def write32(self, name: str, offset: int, value: int) -> None:
        """Writes a 32 bit device register; see ``read32``."""
        with _Registers(self.path / name, name) as registers:
            struct.pack_into("<I", registers, offset, value)


class _Registers:
    """A mapped PCI resource, for the time of one access."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __enter__(self) -> mmap.mmap:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_SYNC)
            try:
                self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _host_error("cannot map the device registers", self._name, error) from None
        return self._map

    def __exit__(self, *_: object) -> None:
        self._map.close()


def _host_error(what: str, name: str, error: OSError) -> HostError:
    return HostError(f"{what} /{name}", _HINTS.get(error.errno or 0, ""), error.errno or 0)
