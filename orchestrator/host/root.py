"""Access to the kernel: files (the only code that opens /sys and /proc), devices, thread affinities, and the network.

The root is a value, which tests replace. Names are relative ("sys/devices/system/cpu/online"), so they cannot leave a fake root.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
from dataclasses import dataclass, field
from errno import EACCES, EBUSY, ENOENT, EPERM
from pathlib import Path
from typing import Any, Protocol, cast

from orchestrator.errors import HostError
from orchestrator.model.topology import Link, VfState
from orchestrator.model.uplink import FrameCounts, HairpinResult, QueueCounts
from orchestrator.values import CpuSet, MacAddress

_HINTS = {
    EPERM: "run as root; in a container the file may be masked",
    EACCES: "run as root",
    ENOENT: "the kernel or the device does not support this: check with `nohype survey`",
    EBUSY: "check which program or driver uses the device",
}
_CHUNK = 1 << 16  # bytes; most files are smaller than a page


Rule = list[dict[str, Any]]
"""A rule of nftables, as its statements (libnftables-json(5))."""


@dataclass(frozen=True)
class Chain:
    """A base chain of nftables. It sees the frames of one device at a hook, "ingress" or "egress".

    Chains of a lower ``priority`` see them first.
    """

    name: str
    hook: str
    device: str
    rules: list[Rule]
    policy: str = "accept"
    priority: int = 0


class Probe(Protocol):
    """As `host.hairpin.HairpinProbe`."""

    def attempt(self, wait: float) -> bool: ...
    def discard(self) -> None: ...
    def close(self) -> None: ...


class Net(Protocol):
    """The network of a host; the module `host.netlink` implements and documents it."""

    def read_links(self) -> tuple[Link, ...]: ...
    def read_addressed(self) -> frozenset[str]: ...
    def read_vfs(self, interface: str) -> tuple[VfState, ...]: ...
    def enforce_vf(self, interface: str, wanted: VfState) -> dict[str, HostError]: ...
    def read_hwmode(self, interface: str) -> str | None: ...
    def set_hwmode(self, interface: str, mode: str) -> None: ...
    def set_link_up(self, interface: str, *, up: bool) -> None: ...
    def delete_link(self, name: str) -> None: ...
    def set_promiscuous(self, interface: str, *, on: bool) -> None: ...
    def create_tap(self, name: str, uplink: str, mac: MacAddress, drain: str) -> None: ...
    def restore_tap(self, name: str, uplink: str, mac: MacAddress, drain: str) -> None: ...
    def create_macvtap(self, name: str, uplink: str, mac: MacAddress) -> None: ...
    def restore_macvtap(self, name: str) -> None: ...
    def read_table(self, table: str) -> tuple[Chain, ...] | None: ...
    def replace_table(self, table: str, *chains: Chain) -> None: ...
    def delete_table(self, table: str) -> None: ...
    def count_packets(self, table: str) -> dict[str, int] | None: ...
    def probe_hairpin(self, uplink: str, *, attempts: int = 5, wait: float = 0.4) -> HairpinResult: ...
    def open_hairpin(self, uplink: str) -> Probe: ...
    def read_counters(self) -> dict[str, FrameCounts]: ...
    def read_queue(self, interface: str) -> QueueCounts: ...
    def read_vf_counters(self, interface: str) -> dict[int, FrameCounts]: ...


class _NoNet:
    """For a HostRoot that is used for files only. Every call is a programming error."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_arguments: object, **_more: object) -> None:
            raise NotImplementedError(f"this HostRoot was opened without a network, and so without {name}()")

        return refuse


@dataclass(frozen=True)
class HostRoot:
    """The pseudo file systems below one folder, the scheduler and the network of a host.

    All methods raise HostError with the file's name and the kernel's errno. `net` is the module `host.netlink`.
    """

    path: Path = Path("/")
    net: Net = field(default=cast(Net, _NoNet()), repr=False)

    def read(self, name: str) -> str:
        """The text without surrounding white space."""
        return self.read_bytes(name).decode(errors="replace").strip()

    def read_bytes(self, name: str) -> bytes:
        try:
            # open() needs twice as many system calls, and a survey reads thousands of files.
            descriptor = os.open(self._at(name), os.O_RDONLY)
            try:
                parts = []
                while part := os.read(descriptor, _CHUNK):
                    parts.append(part)
            finally:
                os.close(descriptor)
            return b"".join(parts)
        except OSError as error:
            raise host_error("cannot read", name, error) from None

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        try:
            descriptor = os.open(self._at(name), os.O_RDONLY)
            try:
                found = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise host_error("cannot read", name, error) from None
        if len(found) != length:
            raise HostError(f"cannot read {length} bytes of /{name} at offset {offset}: it ends at {offset + len(found)}")
        return found

    def find(self, name: str) -> str | None:
        """None if the file does not exist. A file that may not be read is an error."""
        try:
            return self.read(name)
        except HostError as error:
            if error.errno == ENOENT:
                return None
            raise

    def write(self, name: str, value: str) -> None:
        """One write(2) to an existing file. The caller reads back: some files are write-only."""
        try:
            descriptor = os.open(self._at(name), os.O_WRONLY)
            try:
                os.write(descriptor, value.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise host_error(f"cannot write {value!r} to", name, error) from None

    def make_folder(self, name: str) -> None:
        """For pseudo file systems where mkdir(2) creates a kernel object."""
        try:
            os.mkdir(self._at(name))
        except OSError as error:
            raise host_error("cannot create", name, error) from None

    def remove_folder(self, name: str) -> None:
        """Inverse of ``make_folder``: rmdir(2) removes the object with its files."""
        try:
            os.rmdir(self._at(name))
        except OSError as error:
            raise host_error("cannot remove", name, error) from None

    def exists(self, name: str) -> bool:
        """Follows symbolic links."""
        return os.path.exists(self._at(name))

    def link(self, name: str) -> str | None:
        """The last part of a symbolic link's target ("vfio-pci"), None if the link does not exist."""
        try:
            return os.path.basename(os.readlink(self._at(name)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise host_error("cannot read the link", name, error) from None

    def target(self, name: str) -> str | None:
        """The whole target of a symbolic link ("/dev/vfio/9"), None if the link does not exist."""
        try:
            return os.readlink(self._at(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise host_error("cannot read the link", name, error) from None

    def names(self, name: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(os.listdir(self._at(name))))
        except OSError as error:
            raise host_error("cannot list", name, error) from None

    def read32(self, name: str, offset: int) -> int:
        """A little-endian 32-bit device register in a PCI `resourceN` file; offset in bytes."""
        with _Registers(self._at(name), name) as registers:
            return int(struct.unpack_from("<I", registers, offset)[0])

    def write32(self, name: str, offset: int, value: int) -> None:
        with _Registers(self._at(name), name) as registers:
            struct.pack_into("<I", registers, offset, value)

    def _at(self, name: str) -> str:
        # A survey reads a thousand files, and in the emulated lab each Path costs a millisecond.
        return f"{self.path}/{name}"

    def open_device(self, name: str, number: str, flags: int) -> int:
        """Opens /dev/NAME and returns the descriptor. `number` is the kernel's "major:minor": a node that stands for another
        device is an error.
        """
        node = f"dev/{name}"
        try:
            descriptor = os.open(self._at(node), flags | os.O_CLOEXEC)
        except OSError as error:
            raise host_error("cannot open", node, error) from None
        actual = _format_number(os.fstat(descriptor))
        if actual != number:
            os.close(descriptor)
            what = f"/{node} is not the device {name}: device number {actual or 'none'}, kernel's number {number}"
            raise HostError(what, "check that devtmpfs is mounted on /dev")
        return descriptor

    def find_device_number(self, name: str) -> str | None:
        """The number "major:minor" of a device node; None if the file does not exist or is not a device node."""
        try:
            return _format_number(os.stat(self._at(name)))
        except OSError:
            return None

    def ioctl(self, descriptor: int, request: int, argument: bytearray, data: bytearray | None = None) -> int:
        """Returns the call's own result, and changes `argument` as the kernel does. `data` is a buffer whose address is in it."""
        try:
            return int(fcntl.ioctl(descriptor, request, argument))
        except OSError as error:
            raise HostError(f"ioctl {request:#x} failed", errno=error.errno or 0) from None

    def sched_getaffinity(self, tid: int) -> CpuSet:
        """Callers use `host.cpus.read_affinity`."""
        try:
            return CpuSet.of(os.sched_getaffinity(tid))
        except OSError as error:
            raise HostError(f"cannot read the affinity of thread {tid}", errno=error.errno or 0) from None

    def sched_setaffinity(self, tid: int, cpus: CpuSet) -> None:
        """Callers use `host.cpus.set_affinity`, which reads back."""
        try:
            os.sched_setaffinity(tid, cpus)
        except OSError as error:
            raise HostError(f"cannot confine thread {tid} to CPUs {cpus}", errno=error.errno or 0) from None


class _Registers:
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


def _format_number(found: os.stat_result) -> str | None:
    is_device = stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode)
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if is_device else None


def host_error(what: str, name: str, error: OSError) -> HostError:
    return HostError(f"{what} /{name}", _HINTS.get(error.errno or 0, ""), error.errno or 0)
