"""All of the kernel that the rest sees: files (the only opener of /sys, /proc, cgroupfs and tracefs), threads, the network.

The root is a value, so tests and containers can give another one. Names are relative (``sys/devices/system/cpu/online``), so that
nothing escapes a fake root by being absolute.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field
from errno import ENOENT
from pathlib import Path
from typing import Protocol

from orchestrator.errors import HostError
from orchestrator.model.topology import Link, VfState
from orchestrator.values import CpuSet

_HINTS = {
    1: "run as root; in a container the file may be masked",
    13: "run as root",
    2: "the kernel or the device does not offer this; `nohype survey` shows what is there",
    16: "something else uses it",
}

_PART = 1 << 16
"""Bytes to read at a time: most files of the kernel are smaller than a page."""


class Net(Protocol):
    """What we do with a host's network interfaces. `host.netlink` is the real one, and says what each function raises."""

    def read_links(self) -> tuple[Link, ...]:
        """All interfaces."""

    def read_addressed(self) -> frozenset[str]:
        """The names of the interfaces that have an IP address."""

    def read_vfs(self, interface: str) -> tuple[VfState, ...]:
        """What a PF enforces for its VFs."""

    def enforce_vf(self, interface: str, wanted: VfState) -> dict[str, HostError]:
        """Makes the PF enforce this for a VF; returns what the driver refused, by attribute."""

    def read_hwmode(self, interface: str) -> str | None:
        """How the NIC switches between its VFs, None where the driver does not tell."""

    def set_hwmode(self, interface: str, mode: str) -> None:
        """Sets how the NIC switches between its VFs."""


class _NoNet:
    """Stands in for the network where only files are wanted. Asking it for something is a fault of ours."""

    def read_links(self) -> tuple[Link, ...]:
        raise NotImplementedError("this HostRoot was opened without a network")

    def read_addressed(self) -> frozenset[str]:
        return frozenset(map(str, self.read_links()))

    def read_vfs(self, interface: str) -> tuple[VfState, ...]:
        raise NotImplementedError(f"this HostRoot was opened without a network, and so without {interface}")

    def enforce_vf(self, interface: str, wanted: VfState) -> dict[str, HostError]:
        raise NotImplementedError(f"this HostRoot was opened without a network, and so without {interface}: {wanted}")

    def read_hwmode(self, interface: str) -> str | None:
        return str(self.read_links())

    def set_hwmode(self, interface: str, mode: str) -> None:
        self.read_links()


@dataclass(frozen=True)
class HostRoot:
    """A host: its pseudo file systems below one folder, its scheduler and its network.

    All methods raise HostError with the file's name and the kernel's errno.

    Attributes:
        net: give the module `host.netlink` for the real network; without it only files and threads can be had.
    """

    path: Path = Path("/")
    net: Net = field(default=_NoNet(), repr=False)

    def read(self, name: str) -> str:
        """The file's text without surrounding white space."""
        return self.read_bytes(name).decode(errors="replace").strip()

    def read_bytes(self, name: str) -> bytes:
        """The file's bytes; for files with NULs, such as /proc/PID/cmdline."""
        try:
            # Not by open(): that is twice as many system calls, and there are many such files.
            descriptor = os.open(self._at(name), os.O_RDONLY)
            try:
                parts = []
                while part := os.read(descriptor, _PART):
                    parts.append(part)
            finally:
                os.close(descriptor)
            return b"".join(parts)
        except OSError as error:
            raise host_error("cannot read", name, error) from None

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` on; for binary files such as /proc/PID/pagemap."""
        try:
            descriptor = os.open(self._at(name), os.O_RDONLY)
            try:
                found = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise host_error("cannot read", name, error) from None
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
            descriptor = os.open(self._at(name), os.O_WRONLY)
            try:
                os.write(descriptor, value.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise host_error(f"cannot write {value!r} to", name, error) from None

    def exists(self, name: str) -> bool:
        """Whether the name is there (symbolic links followed)."""
        return os.path.exists(self._at(name))

    def link(self, name: str) -> str | None:
        """The last part of a symbolic link's target (``driver`` -> "vfio-pci"), or None if there is no such link."""
        try:
            return os.path.basename(os.readlink(self._at(name)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise host_error("cannot read the link", name, error) from None

    def target(self, name: str) -> str | None:
        """The whole text of a symbolic link (``fd/21`` -> "/dev/vfio/9"), or None if there is no such link."""
        try:
            return os.readlink(self._at(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise host_error("cannot read the link", name, error) from None

    def names(self, name: str) -> tuple[str, ...]:
        """The names in a folder, sorted."""
        try:
            return tuple(sorted(os.listdir(self._at(name))))
        except OSError as error:
            raise host_error("cannot list", name, error) from None

    def read32(self, name: str, offset: int) -> int:
        """A little-endian 32 bit device register through a PCI ``resourceN`` file; offset in bytes."""
        with _Registers(self._at(name), name) as registers:
            return int(struct.unpack_from("<I", registers, offset)[0])

    def write32(self, name: str, offset: int, value: int) -> None:
        """Writes a 32 bit device register; see ``read32``."""
        with _Registers(self._at(name), name) as registers:
            struct.pack_into("<I", registers, offset, value)

    def _at(self, name: str) -> str:
        # Not through pathlib: a survey reads a thousand files, and in the emulated lab each Path costs a millisecond.
        return f"{self.path}/{name}"

    def sched_getaffinity(self, tid: int) -> CpuSet:
        """The CPUs that a thread may run on (sched_getaffinity(2)); use ``host.cpus.read_affinity``."""
        try:
            return CpuSet.of(os.sched_getaffinity(tid))
        except OSError as error:
            raise HostError(f"cannot read the affinity of thread {tid}", errno=error.errno or 0) from None

    def sched_setaffinity(self, tid: int, cpus: CpuSet) -> None:
        """Confines a thread to CPUs (sched_setaffinity(2)); use ``host.cpus.set_affinity``, which reads back."""
        try:
            os.sched_setaffinity(tid, cpus)
        except OSError as error:
            raise HostError(f"cannot confine thread {tid} to CPUs {cpus}", errno=error.errno or 0) from None


class _Registers:
    """A mapped PCI resource, for the time of one access."""

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name

    def __enter__(self) -> mmap.mmap:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_SYNC)
            try:
                self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise host_error("cannot map the device registers", self._name, error) from None
        return self._map

    def __exit__(self, *_: object) -> None:
        self._map.close()


def host_error(what: str, name: str, error: OSError) -> HostError:
    return HostError(f"{what} /{name}", _HINTS.get(error.errno or 0, ""), error.errno or 0)
