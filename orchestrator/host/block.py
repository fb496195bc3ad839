"""Block devices by the kernel's name ("nvme0n1", "dm-3"): size, partitions, exclusive access (sysfs-block, open(2))."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EBUSY, EIO, ENODEV
from functools import cache

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.values import Size
from orchestrator.waiting import wait_until

BLOCK = "sys/class/block"
CHUNK = 1 << 20  # bytes of one read or write; a multiple of every block size
SECTOR = 512  # the unit of /sys/class/block/NAME/size on every device
_LOCK_TIMEOUT = 30  # seconds


@dataclass(frozen=True)
class BlockProgress:
    """What a scrub or a write is doing, in bytes of one device."""

    device: str
    phase: str  # "format", "write-zeroes", "overwrite", "write" or "verify"
    done: int
    total: int


Report = Callable[[BlockProgress], None]


def is_zero(data: bytes | memoryview) -> bool:
    """Whether all bytes are zero, of at most CHUNK."""
    zeros = _zeros()
    return (zeros if len(data) == CHUNK else zeros[: len(data)]) == data


@cache
def _zeros() -> bytes | bytearray:
    """Not before it is used: most managers have no disks, and it is 1 MB of memory.

    memcmp(3) without a copy: bytearray compares buffers of any type in C, memoryview compares item by item.
    """
    return bytearray(CHUNK)


def read_size(host: HostRoot, device: str) -> tuple[Size, int]:
    """Size of a block device and its logical block size in bytes."""
    return Size(_read_number(host, f"{BLOCK}/{device}/size") * SECTOR), _read_block_size(host, device)


def read_device_number(host: HostRoot, device: str) -> str:
    """The kernel's device number, "259:0". Raises HostError (ENODEV) if the device does not exist."""
    text = host.find(f"{BLOCK}/{device}/dev")
    if text is None:
        raise HostError(f"block device {device} does not exist", "check the disk with `nohype survey`", ENODEV)
    return text


def read_partitions(host: HostRoot, device: str) -> tuple[str, ...]:
    """Names of the partitions that the kernel has found on the device."""
    folder = f"{BLOCK}/{device}"
    names = host.names(folder) if host.exists(folder) else ()
    return tuple(name for name in names if name.startswith(device) and host.exists(f"{folder}/{name}/partition"))


def is_read_only(host: HostRoot, device: str) -> bool:
    return host.find(f"{BLOCK}/{device}/ro") not in (None, "0")


def open_exclusive(host: HostRoot, device: str, flags: int) -> int:
    """The caller closes the descriptor. Raises HostError: EBUSY if the device or a partition is in use, ENODEV if it is gone."""
    # O_EXCL without O_CREAT: open(2). It also fails if a partition is in use: bd_prepare_to_claim(), block/bdev.c.
    try:
        return host.open_device(device, read_device_number(host, device), flags | os.O_EXCL)
    except HostError as error:
        if error.errno != EBUSY:
            raise
        what = f"block device {device} is in use"
        raise HostError(what, f"`lsblk /dev/{device}` shows file systems, swap, LVM and RAID", EBUSY) from None


@contextmanager
def claim_device(host: HostRoot, device: str, flags: int = os.O_RDWR | os.O_DIRECT) -> Iterator[int]:
    """Opens the device for exclusive use during the block, and yields the descriptor.

    While it is open, the kernel refuses to mount it or a partition of it, to use it for swap, LVM, RAID or ZFS, and to read its
    partition table again. udev does not examine it: https://systemd.io/BLOCK_DEVICE_LOCKING.

    Raises HostError: EBUSY if the device or a partition is in use, or another program has locked it for 30 s.
    """
    descriptor = open_exclusive(host, device, flags)
    try:
        _lock(device, descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, buffer: memoryview, offset: int, device: str) -> None:
    """Fills the buffer. Releases Python's lock while it waits. Raises HostError (EIO) at the end of the device."""
    try:
        count = os.preadv(descriptor, [buffer], offset)
    except OSError as error:
        raise _explain(f"cannot read {device} at offset {offset}", error.errno) from None
    if count != len(buffer):
        raise _explain(f"cannot read {device} at offset {offset}: {count} of {len(buffer)} bytes", EIO)


def write_at(descriptor: int, buffer: memoryview, offset: int, device: str) -> None:
    """Writes the whole buffer, otherwise as `read_at`."""
    try:
        count = os.pwritev(descriptor, [buffer], offset)
    except OSError as error:
        raise _explain(f"cannot write {device} at offset {offset}", error.errno) from None
    if count != len(buffer):
        raise _explain(f"cannot write {device} at offset {offset}: {count} of {len(buffer)} bytes", EIO)


def sync(descriptor: int, device: str) -> None:
    """Empties the write cache of the disk, which O_DIRECT does not bypass."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise _explain(f"cannot flush {device}", error.errno) from None


def _explain(what: str, number: int | None) -> HostError:
    return HostError(what, "check the kernel log with dmesg, and the disk with `smartctl -a`", number or 0)


def _lock(device: str, descriptor: int) -> None:
    # udev holds a shared lock for the time of its examination of a new device.
    if not wait_until(lambda: _try_lock(descriptor), timeout=_LOCK_TIMEOUT, interval=0.05):
        what = f"block device {device} has been locked by another program for {_LOCK_TIMEOUT} s"
        raise HostError(what, f"`lslocks` and `fuser /dev/{device}` show the program", EBUSY)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_block_size(host: HostRoot, device: str) -> int:
    return _read_number(host, f"{BLOCK}/{device}/queue/logical_block_size")


def _read_number(host: HostRoot, name: str) -> int:
    text = host.read(name)
    if not text.isdecimal():
        raise HostError(f"cannot parse /{name}: {text!r} is not a number")
    return int(text)
