"""What a disk contains: file systems, partition tables, members of LVM, RAID and ZFS, by util-linux (wipefs(8), libblkid)."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator

from orchestrator.errors import CommandError, HostError
from orchestrator.host.block import CHUNK, read_at, read_device_number, read_size
from orchestrator.host.root import HostRoot
from orchestrator.host.run import run
from orchestrator.model.topology import NvmeController

_TIMEOUT = 30  # seconds


def find_signatures(host: HostRoot, controller: NvmeController) -> tuple[str, ...]:
    """One sentence per signature on a namespace of the controller; empty if nothing is found, and without the driver nvme.

    A check that fails counts as a signature. Contents without a known format count as well, if they are in the first or last MiB.
    """
    return tuple(sentence for namespace in controller.namespaces for sentence in find_device_signatures(host, namespace.device))


def find_device_signatures(host: HostRoot, device: str) -> tuple[str, ...]:
    """As `find_signatures`, for one block device."""
    try:
        return tuple(_read_signatures(host, device)) or tuple(_find_unknown(host, device))
    except HostError as error:
        return (f"the contents of {device} cannot be checked: {error.message}",)


def _read_signatures(host: HostRoot, device: str) -> Iterator[str]:
    # Unlike blkid(8), wipefs lists all signatures, also if several formats match or a checksum is wrong. Without --all it changes
    # nothing. The parsers of util-linux read untrusted data, so they run in a process of their own.
    path = host.path / "dev" / device
    os.close(host.open_device(device, read_device_number(host, device), os.O_RDONLY))
    text = run(["wipefs", "--no-act", "--json", "--", path], timeout=_TIMEOUT).stdout
    for found in parse_signatures(text):
        yield f"{device} contains {found}"


def parse_signatures(text: str) -> tuple[str, ...]:
    """Type, offset and label of each signature in the JSON output of wipefs; empty without output."""
    if not text.strip():
        return ()
    try:
        signatures = json.loads(text)["signatures"]
        return tuple(_describe(str(one["type"]), str(one["offset"]), one.get("label")) for one in signatures)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandError(f"cannot parse the output of wipefs: {text[:200]!r}") from None


def _describe(kind: str, offset: str, label: object) -> str:
    return f"{kind} at offset {offset}" + (f" (label {str(label)!r})" if label else "")


def _find_unknown(host: HostRoot, device: str) -> Iterable[str]:
    # Encrypted volumes without a header, databases and object stores on raw devices. A disk that was never used, or was erased,
    # returns one byte value.
    size = read_size(host, device)[0].bytes
    descriptor = host.open_device(device, read_device_number(host, device), os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, CHUNK) as buffer, memoryview(buffer) as view:
            for start in sorted({0, max(0, size - CHUNK)}):
                count = min(CHUNK, size)
                with view[:count] as piece:
                    read_at(descriptor, piece, start, device)
                data = buffer[:count]
                if data.strip(b"\0") and data.strip(b"\xff"):
                    return [f"{device} contains data of an unknown format between the bytes {start} and {start + count}"]
    finally:
        os.close(descriptor)
    return []
