"""Erases disks, and proves it: every byte is read back and must be zero. The status of a command is never the result."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from errno import EINVAL, ENODEV, ENOTTY

from orchestrator.errors import HostError
from orchestrator.host.block import BLOCK, CHUNK, BlockProgress, Report, claim_device, is_zero, read_at, read_size, sync, write_at
from orchestrator.host.nvme import read_identified
from orchestrator.host.nvme_admin import find_lba_format, format_namespace, read_abilities, read_namespace_ids
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import NvmeController, NvmeNamespace
from orchestrator.values import PciAddress

# include/uapi/linux/fs.h: _IO(0x12, 95) and _IO(0x12, 127).
BLKRRPART, BLKZEROOUT = 0x12 << 8 | 95, 0x12 << 8 | 127
_ZEROOUT = 256 << 20  # bytes of one BLKZEROOUT, which cannot be interrupted

_Erase = Callable[[int], None]  # takes the descriptor of the device


@dataclass(frozen=True)
class ScrubResult:
    """A disk that contains only zeros."""

    method: str  # the one that worked: "format", "write-zeroes" or "overwrite"; of several devices the last one in this order
    size: int  # bytes that were read back
    failures: tuple[str, ...]  # one sentence per method that did not work


_METHODS = ("format", "write-zeroes", "overwrite")


def scrub_controller(
    host: HostRoot, address: PciAddress, serial: str, namespaces: tuple[NvmeNamespace, ...], report: Report
) -> ScrubResult:
    """Erases all namespaces of a controller that is bound to the driver nvme, and verifies each byte.

    `namespaces` are those that the controller had when it was claimed; their device names do not matter. A namespace with another
    block size gets the former one. `report` is called after each piece; an exception of it, except a HostError, ends the scrub.

    Raises HostError: another controller is at the address; namespaces were created, deleted, resized or made inactive; the host
    uses the disk (EBUSY); no method leaves only zeros.
    """
    controller = read_identified(host, address, serial)
    _check_namespaces(host, controller, namespaces)
    wanted = {namespace.nsid: namespace for namespace in namespaces}
    results = [_scrub_namespace(host, controller, now, wanted[now.nsid], report) for now in controller.namespaces]
    _check_sizes(read_identified(host, address, serial), wanted)
    method = max((result.method for result in results), key=_METHODS.index)
    return ScrubResult(method, sum(result.size for result in results), tuple(text for one in results for text in one.failures))


def scrub_device(host: HostRoot, device: str, report: Report) -> ScrubResult:
    """Erases a block device without commands of NVMe, such as a logical volume, and verifies each byte."""
    return _scrub(host, device, {}, report)


def find_data(host: HostRoot, device: str, report: Report) -> int | None:
    """The offset of the first byte that is not zero, None if there is none. Reads the whole device, bypassing the page cache."""
    with claim_device(host, device, os.O_RDONLY | os.O_DIRECT) as descriptor:
        return _find_data(descriptor, device, read_size(host, device)[0].bytes, report)


def _scrub_namespace(
    host: HostRoot, controller: NvmeController, now: NvmeNamespace, wanted: NvmeNamespace, report: Report
) -> ScrubResult:
    def format_it(_: int) -> None:
        lba_format = find_lba_format(host, controller, now.nsid, wanted.block_size)
        if lba_format is None:
            raise HostError(f"namespace {now.device} has no LBA format of {wanted.block_size} bytes without metadata")
        format_namespace(host, controller, now.nsid, lba_format)

    return _scrub(host, now.device, {"format": format_it} if read_abilities(host, controller).format else {}, report)


def _scrub(host: HostRoot, device: str, special: dict[str, _Erase], report: Report) -> ScrubResult:
    failures: list[str] = []
    with claim_device(host, device) as descriptor:
        for method in _METHODS:
            if method == "format" and method not in special:
                continue
            try:
                # Read for each method: a format can change the number of blocks.
                size = read_size(host, device)[0].bytes
                _erase(host, descriptor, device, method, special.get(method), size, report)
                size = read_size(host, device)[0].bytes
                dirty = _find_data(descriptor, device, size, report)
            except HostError as error:
                if not host.exists(f"{BLOCK}/{device}"):
                    what = f"{device} disappeared while it was erased: {error.message}"
                    raise HostError(what, "check the kernel log with dmesg", ENODEV) from None
                failures.append(f"{method}: {error.message}")
                continue
            if dirty is None:
                _forget_partitions(host, descriptor)
                return ScrubResult(method, size, tuple(failures))
            failures.append(f"{method}: it reported success, but the byte at offset {dirty} of {device} is not zero")
    raise HostError(
        f"cannot erase {device}: {'; '.join(failures)}", "replace the disk, or erase it with the tool of its manufacturer"
    )


def _erase(host: HostRoot, descriptor: int, device: str, method: str, special: _Erase | None, size: int, report: Report) -> None:
    report(BlockProgress(device, method, 0, size))
    if special:
        special(descriptor)
        report(BlockProgress(device, method, size, size))
        return
    step = _ZEROOUT if method == "write-zeroes" else CHUNK
    with mmap.mmap(-1, CHUNK) as buffer, memoryview(buffer) as view:
        for start in range(0, size, step):
            count = min(step, size - start)
            if method == "write-zeroes":
                _zero_out(host, descriptor, device, start, count)
            else:
                with view[:count] as piece:
                    write_at(descriptor, piece, start, device)
            report(BlockProgress(device, method, start + count, size))
    sync(descriptor, device)


def _zero_out(host: HostRoot, descriptor: int, device: str, start: int, count: int) -> None:
    try:
        # The kernel uses Write Zeroes, or writes zeros where the device does not know the command: blkdev_issue_zeroout().
        host.ioctl(descriptor, BLKZEROOUT, bytearray(struct.pack("=QQ", start, count)))
    except HostError as error:
        what = f"cannot write zeros to {device} at offset {start}"
        raise HostError(what, "check the kernel log with dmesg", error.errno) from None


def _find_data(descriptor: int, device: str, size: int, report: Report) -> int | None:
    with mmap.mmap(-1, CHUNK) as buffer, memoryview(buffer) as view:
        for start in range(0, size, CHUNK):
            count = min(CHUNK, size - start)
            with view[:count] as piece:
                read_at(descriptor, piece, start, device)
                if not is_zero(piece):
                    return start + count - len(bytes(piece).lstrip(b"\0"))
            report(BlockProgress(device, "verify", start + count, size))
    return None


def _check_namespaces(host: HostRoot, controller: NvmeController, wanted: tuple[NvmeNamespace, ...]) -> None:
    active, inactive = read_namespace_ids(host, controller)
    expected = tuple(sorted(namespace.nsid for namespace in wanted))
    shown = tuple(namespace.nsid for namespace in controller.namespaces)
    if inactive or active != expected or shown != expected:
        raise HostError(
            f"NVMe controller {controller.address} ({controller.serial}): active namespaces {_format(active)}, inactive "
            f"{_format(inactive)}, block devices for {_format(shown)}, expected {_format(expected)}",
            "restore the namespaces with `nvme create-ns` and `nvme attach-ns`, or replace the disk",
        )


def _format(ids: tuple[int, ...]) -> str:
    return ",".join(map(str, ids)) or "none"


def _check_sizes(controller: NvmeController, wanted: dict[int, NvmeNamespace]) -> None:
    for now in controller.namespaces:
        before = wanted.get(now.nsid)
        if not before or (now.size, now.block_size) != (before.size, before.block_size):
            expected = f"{before.size} in blocks of {before.block_size}" if before else "no namespace of this number"
            raise HostError(
                f"namespace {now.nsid} of NVMe controller {controller.address} ({controller.serial}): {now.size} in blocks of "
                f"{now.block_size}, expected {expected}",
                "restore the namespace with `nvme format` or `nvme create-ns`, or replace the disk",
            )


def _forget_partitions(host: HostRoot, descriptor: int) -> None:
    # Otherwise partitions that were erased stay in /dev. EINVAL: the device cannot have partitions.
    try:
        host.ioctl(descriptor, BLKRRPART, bytearray(8))
    except HostError as error:
        if error.errno not in (EINVAL, ENOTTY):
            raise
