"""How the host uses NVMe controllers and block devices: mounts, swap, LVM, RAID, exports, open files. Reads only."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from errno import EACCES, EBUSY, EINVAL, ENODEV, ENOENT, ESRCH
from functools import partial

from orchestrator.errors import HostError
from orchestrator.host.block import BLOCK, open_exclusive, read_device_number, read_partitions
from orchestrator.host.nvme import NVME
from orchestrator.host.pci import VFIO, refuse_if_in_use
from orchestrator.host.processes import find_comm
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import NvmeController
from orchestrator.waiting import wait_until

_CONFIGFS = "sys/kernel/config"
_GONE = (ENOENT, ESRCH, EINVAL)  # EINVAL: mountinfo of a zombie, mounts_open_common() in fs/proc_namespace.c
# udev opens a new device for the time of its examination.
_EXAMINATION = 3.0  # seconds


@dataclass(frozen=True)
class _Nodes:
    """Device nodes of one disk: namespaces, partitions, and the character devices of NVMe."""

    blocks: tuple[str, ...]  # partitions follow their disk
    characters: tuple[str, ...]
    numbers: dict[str, str]  # block device by "major:minor"

    def find_path(self, path: str) -> str | None:
        name = path.removeprefix("/dev/")
        return name if path.startswith("/dev/") and name in (*self.blocks, *self.characters) else None


def find_users(host: HostRoot, controller: NvmeController) -> tuple[str, ...]:
    """One sentence per use of the controller by the host, empty if the host does not use it. A check that fails counts as a use.

    Not detected: a program that has opened the device through a node outside /dev, and not for exclusive use.
    """
    if controller.driver == VFIO:
        try:
            refuse_if_in_use(host, controller.address, "")
        except HostError as error:
            if error.errno != EBUSY:
                return (f"its use cannot be checked: {error.message}",)
            return (f"controller {controller.address}: a guest or a program has opened it through {VFIO}",)
        return ()
    if controller.driver not in (None, NVME):
        return (f"controller {controller.address}: driver {controller.driver}, expected {NVME} or none",)
    generic = (re.sub(r"^nvme", "ng", namespace.device) for namespace in controller.namespaces)
    characters = (*([controller.name] if controller.name else []), *generic)
    return _find_users(host, tuple(namespace.device for namespace in controller.namespaces), characters)


def find_device_users(host: HostRoot, device: str) -> tuple[str, ...]:
    """As `find_users`, for one block device: a logical volume or another disk."""
    return _find_users(host, (device,), ())


def _find_users(host: HostRoot, devices: tuple[str, ...], characters: tuple[str, ...]) -> tuple[str, ...]:
    try:
        blocks = tuple(name for device in devices for name in (device, *read_partitions(host, device)))
        nodes = _Nodes(blocks, characters, {read_device_number(host, name): name for name in blocks})
    except HostError as error:
        return (f"its use cannot be checked: {error.message}",)
    checks: tuple[Callable[[HostRoot, _Nodes], Iterable[str]], ...] = (
        _find_mounts, _find_swap, _find_holders, _find_loops, _find_exports, partial(_find_claims, devices=devices),
    )  # fmt: skip
    found = [sentence for check in checks for sentence in _try(check, host, nodes)]
    read = partial(_read_openers, host, nodes)
    # One reason is enough not to wait for the end of an examination.
    openers, unread = read() if found else wait_until(read, lambda both: not both[0], timeout=_EXAMINATION, interval=0.2)
    return (*found, *openers, *unread)


def _try(check: Callable[[HostRoot, _Nodes], Iterable[str]], host: HostRoot, nodes: _Nodes) -> tuple[str, ...]:
    try:
        return tuple(check(host, nodes))
    except HostError as error:
        return (f"its use cannot be checked: {error.message}",)


def _find_mounts(host: HostRoot, nodes: _Nodes) -> Iterator[str]:
    """Mounts in all mount namespaces that have a process."""
    seen: set[str] = set()
    reported: set[tuple[str, str]] = set()
    for pid in _read_pids(host):
        try:
            namespace = _find_mount_namespace(host, pid)
            if namespace in seen:
                continue
            text = host.read(f"proc/{pid}/mountinfo")
        except HostError as error:
            if error.errno in _GONE:
                continue
            raise
        seen |= {namespace} if namespace else set()
        for device, where in _parse_mountinfo(text, nodes):
            if (device, where) not in reported:
                reported.add((device, where))
                yield f"{device} is mounted on {where}" + (f" in the mount namespace of process {pid}" if pid != 1 else "")


def _find_mount_namespace(host: HostRoot, pid: int) -> str | None:
    # The link needs more privileges (CAP_SYS_PTRACE) than mountinfo, and only saves reading each namespace once per process.
    try:
        return host.target(f"proc/{pid}/ns/mnt")
    except HostError as error:
        if error.errno != EACCES:
            raise
        return None


def _parse_mountinfo(text: str, nodes: _Nodes) -> Iterator[tuple[str, str]]:
    # proc_pid_mountinfo(5): ID PARENT MAJOR:MINOR ROOT WHERE OPTIONS [TAGS] - TYPE SOURCE OPTIONS. btrfs has a number of its own
    # there, and names one of its devices as source.
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, source = head.split(), tail.split()[1:2]
        if len(fields) < 5:
            raise HostError(f"cannot parse mountinfo: {line!r}")
        device = nodes.numbers.get(fields[2]) or nodes.find_path(_unescape(source[0]) if source else "")
        if device:
            yield device, _unescape(fields[4])


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _find_swap(host: HostRoot, nodes: _Nodes) -> Iterator[str]:
    # proc_swaps(5); the file does not exist in a kernel without swap.
    for line in (host.find("proc/swaps") or "").splitlines()[1:]:
        device = nodes.find_path(_unescape(line.split()[0])) if line.strip() else None
        if device:
            yield f"{device} is used for swap"


def _find_holders(host: HostRoot, nodes: _Nodes) -> Iterator[str]:
    # Stacked devices: bd_link_disk_holder() of device mapper (LVM, multipath, dm-crypt), md and bcache.
    for device in nodes.blocks:
        folder = f"{BLOCK}/{device}/holders"
        for holder in host.names(folder) if host.exists(folder) else ():
            name = host.find(f"{BLOCK}/{holder}/dm/name")
            yield f"{device} is part of {holder}" + (f" ({name})" if name else "")


def _find_loops(host: HostRoot, nodes: _Nodes) -> Iterator[str]:
    # A loop device does not open its file, which can be a block device, for exclusive use.
    for name in host.names(BLOCK) if host.exists(BLOCK) else ():
        path = host.find(f"{BLOCK}/{name}/loop/backing_file") if name.startswith("loop") else None
        device = nodes.find_path(path) if path else None
        if device:
            yield f"{device} is behind {name}"


def _find_exports(host: HostRoot, nodes: _Nodes) -> Iterator[str]:
    # The NVMe target opens a block device without O_EXCL: nvmet_bdev_ns_enable(). So does LIO's fileio backend.
    for folder, name, what in _list_exports(host):
        path = host.find(f"{folder}/{name}")
        device = nodes.find_path(path) or nodes.find_path(_resolve(host, path)) if path else None
        if device and host.find(f"{folder}/enable") != "0":
            yield f"{device} is exported by {what}"


def _list_exports(host: HostRoot) -> Iterator[tuple[str, str, str]]:
    for subsystem in _list(host, f"{_CONFIGFS}/nvmet/subsystems"):
        what = f"the NVMe target {os.path.basename(subsystem)}"
        yield f"{subsystem}/passthru", "device_path", what
        yield from ((namespace, "device_path", what) for namespace in _list(host, f"{subsystem}/namespaces"))
    for adapter in _list(host, f"{_CONFIGFS}/target/core"):
        for store in _list(host, adapter) if host.exists(f"{adapter}/hba_info") else ():
            yield store, "udev_path", f"the SCSI target {os.path.basename(store)}"


def _list(host: HostRoot, folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in host.names(folder) if not name.startswith("hba_")] if host.exists(folder) else []


def _resolve(host: HostRoot, path: str) -> str:
    """The node behind a link of udev, such as /dev/disk/by-id/nvme-X; other paths as they are."""
    try:
        name = host.link(path.lstrip("/"))
    except HostError as error:
        if error.errno != EINVAL:
            raise
        return path
    return f"/dev/{name}" if name else path


def _find_claims(host: HostRoot, nodes: _Nodes, devices: tuple[str, ...]) -> Iterator[str]:
    # The kernel's own answer: file systems, swap, device mapper, md, ZFS, bcache, DRBD open their devices for exclusive use. A
    # claim of a partition also refuses that of its disk.
    for device in devices:
        try:
            os.close(open_exclusive(host, device, os.O_RDONLY))
        except HostError as error:
            if error.errno == ENODEV:
                raise
            if error.errno != EBUSY:
                yield f"its use cannot be checked: {error.message}"
                continue
            yield f"{device} or a partition of it is opened for exclusive use"


def _read_openers(host: HostRoot, nodes: _Nodes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One sentence per process that has opened a node; and, if there are processes whose files cannot be read, one for these."""
    openers, unread = [], []
    for pid in _read_pids(host) if nodes.blocks or nodes.characters else ():
        try:
            opened = {_find_opened(host, f"proc/{pid}/fd/{name}", nodes) for name in host.names(f"proc/{pid}/fd")}
        except HostError as error:
            unread += [error.message] if error.errno not in _GONE else []
            continue
        name = _find_name(host, pid)
        openers += [f"{device} is opened by process {pid} ({name})" for device in sorted(device for device in opened if device)]
    what = f"its use by {len(unread)} process{'es' if len(unread) > 1 else ''} cannot be checked: {unread[0]}" if unread else ""
    return tuple(openers), (what,) if what else ()


def _find_name(host: HostRoot, pid: int) -> str:
    try:
        return find_comm(host, pid) or "unknown"
    except HostError:
        return "unknown"


def _find_opened(host: HostRoot, descriptor: str, nodes: _Nodes) -> str | None:
    path = host.target(descriptor)
    if path is None or not path.startswith("/dev/"):
        return None
    # A container may have the device under another name. Elsewhere than in /dev, stat(2) may wait for a network file system.
    return nodes.find_path(path) or nodes.numbers.get(host.find_device_number(descriptor) or "")


def _read_pids(host: HostRoot) -> list[int]:
    return sorted(int(name) for name in host.names("proc") if name.isdecimal())
