"""NVMe controllers of a fake host: what the driver nvme shows of them, and the commands that the product uses.

The contents are sparse files beside the host's folder, since a host is compared as text. A controller is a folder there with
`table.json`, so that the host outlives the process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.host.nvme_admin import ADMIN_COMMAND, FORMAT, IDENTIFY
from orchestrator.host.scrub import BLKZEROOUT

if TYPE_CHECKING:
    from tests.fakes.root import FakeRoot

_DEVICES, _BLOCK, _GROUPS = "sys/bus/pci/devices", "sys/class/block", "sys/kernel/iommu_groups"
_MARK = b"data of guest "
_INVALID_OPCODE, _INVALID_FORMAT = 0x001, 0x10A


@dataclass(frozen=True)
class FakeNvme:
    """A controller with one namespace, whose number is 1.

    Attributes:
        lies: methods ("format", "write-zeroes", "overwrite") that report success and change nothing.
        inactive: numbers of inactive namespaces.
    """

    serial: str
    size: int = 4 << 20
    block_size: int = 512
    model: str = "Fake NVMe"
    formats: bool = True
    lies: tuple[str, ...] = ()
    inactive: tuple[int, ...] = ()
    active: tuple[int, ...] = (1,)


def add_nvme(fake: FakeRoot, address: str, nvme: FakeNvme, node: int = 0) -> None:
    """Adds a controller with an IOMMU group of its own, bound to the driver nvme. Its disk contains only zeros."""
    folder = f"{_DEVICES}/{address}"
    texts = {"class": "0x010802", "vendor": "0x1b36", "device": "0x0010", "numa_node": str(node), "enable": "1"}
    for name, text in {**texts, "driver_override": "(null)", "reset": ""}.items():
        fake.add(f"{folder}/{name}", text)
    numbers = [int(name) for name in fake.names(_GROUPS)] if fake.exists(_GROUPS) else []
    group = f"{_GROUPS}/{max(numbers, default=-1) + 1}"
    fake.add(f"{group}/type", "DMA")
    fake.add_link(f"{group}/devices/{address}", os.path.relpath(folder, f"{group}/devices"))
    fake.add_link(f"{folder}/iommu_group", os.path.relpath(group, folder))
    for name in ("bind", "unbind"):
        fake.add(f"sys/bus/pci/drivers/nvme/{name}")
    fake.add_link(f"{folder}/driver", os.path.relpath("sys/bus/pci/drivers/nvme", folder))
    fake.native[fake.real(folder)] = "nvme"
    fake.keep_tables()
    change_nvme(fake, address, nvme)
    if not disk_file(fake, address).exists():  # as after a power cut
        with disk_file(fake, address).open("wb") as file:
            file.truncate(nvme.size)
    show_nvme(fake, address)


def change_nvme(fake: FakeRoot, address: str, nvme: FakeNvme) -> None:
    """Changes what the controller is; what the driver shows of it is changed by the next bind."""
    (_folder(fake) / address).mkdir(parents=True, exist_ok=True)
    (_folder(fake) / address / "table.json").write_text(json.dumps(asdict(nvme)))


def read_nvme(fake: FakeRoot, address: str) -> FakeNvme:
    table = json.loads((_folder(fake) / address / "table.json").read_text())
    return FakeNvme(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})


def is_nvme(fake: FakeRoot, address: str) -> bool:
    return (_folder(fake) / address / "table.json").exists()


def disk_file(fake: FakeRoot, address: str) -> Path:
    """The contents of the namespace."""
    return _folder(fake) / address / "n1"


def use_disk(fake: FakeRoot, address: str, guest: str) -> list[str]:
    """A guest writes a mark on its disk. Returns what is wrong: another guest's mark is there, or its own one is lost."""
    data, users = disk_file(fake, address).read_bytes(), _folder(fake) / address / "users"
    marks = {data[at + len(_MARK) : at + len(_MARK) + len(guest)].decode(errors="replace") for at in _find_all(data, _MARK)}
    known = users.read_text().split() if users.exists() else []
    found = [f"disk {address} holds data of guest {mark}" for mark in sorted(marks - {guest})]
    if guest in known and guest not in marks:
        found.append(f"disk {address} has lost the data of its guest {guest}")
    with disk_file(fake, address).open("r+b") as file:
        file.seek(len(data) - 4096)
        file.write(_MARK + guest.encode())
    users.write_text(" ".join({*known, guest}))
    return found


def find_dirty(fake: FakeRoot) -> list[str]:
    """The addresses of disks that hold data."""
    folder = _folder(fake)
    return [name for name in sorted(os.listdir(folder)) if any(disk_file(fake, name).read_bytes())] if folder.exists() else []


def _find_all(data: bytes, part: bytes) -> list[int]:
    found, at = [], data.find(part)
    while at >= 0:
        found.append(at)
        at = data.find(part, at + 1)
    return found


def show_nvme(fake: FakeRoot, address: str) -> None:
    """What appears when the driver nvme is bound."""
    nvme, index = read_nvme(fake, address), _find_index(fake, address)
    folder, name, disk = f"{_DEVICES}/{address}/nvme/nvme{index}", f"nvme{index}", f"nvme{index}n1"
    for file, text in {"serial": nvme.serial, "model": nvme.model, "state": "live", "dev": f"240:{index}"}.items():
        fake.add(f"{folder}/{file}", text)
    (fake.path / "dev").mkdir(exist_ok=True)
    control = _folder(fake) / address / "control"
    control.touch()
    fake.add_link(f"dev/{name}", str(control))
    if 1 not in nvme.active:
        return
    fake.add(f"{folder}/{disk}/nsid", "1")
    texts = {"size": str(nvme.size // 512), "dev": f"259:{index}", "nsid": "1", "ro": "0", "uevent": ""}
    for file, text in {**texts, "queue/logical_block_size": str(nvme.block_size)}.items():
        fake.add(f"{_BLOCK}/{disk}/{file}", text)
    fake.add_link(f"dev/{disk}", str(disk_file(fake, address)))


def hide_nvme(fake: FakeRoot, address: str) -> None:
    """What disappears when the driver nvme is unbound."""
    for name in fake.names(f"{_DEVICES}/{address}/nvme"):
        shutil.rmtree(fake.path / _BLOCK / f"{name}n1", ignore_errors=True)
        for node in (name, f"{name}n1"):
            (fake.path / "dev" / node).unlink(missing_ok=True)
    shutil.rmtree(fake.path / _DEVICES / address / "nvme")


def execute(fake: FakeRoot, descriptor: int, request: int, argument: bytearray, data: bytearray | None) -> int:
    """ioctl(2) on a disk or a controller. Raises OSError."""
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    address = path.parent.name
    if not is_nvme(fake, address):  # a logical volume
        if request != BLKZEROOUT:
            raise OSError(errno.ENOTTY, "")
        start, count = struct.unpack("=QQ", argument)
        os.pwrite(descriptor, bytes(count), start)
        return 0
    nvme = read_nvme(fake, address)
    if request == BLKZEROOUT:
        start, count = struct.unpack("=QQ", argument)
        if "write-zeroes" not in nvme.lies:
            os.pwrite(descriptor, bytes(count), start)
        return 0
    if request != ADMIN_COMMAND:
        raise OSError(errno.ENOTTY, "")
    opcode, nsid, word = argument[0], *struct.unpack_from("=I", argument, 4), *struct.unpack_from("=I", argument, 40)
    if opcode == IDENTIFY:
        assert data is not None
        data[:] = _identify(nvme, nsid, word)
        return 0
    if opcode == FORMAT and nvme.formats and nsid in nvme.active:
        block_size = {0: 512, 1: 4096}.get(word & 0xF)
        if block_size is None:
            return _INVALID_FORMAT
        if "format" not in nvme.lies:
            os.truncate(disk_file(fake, address), 0)
            os.truncate(disk_file(fake, address), nvme.size)
        change_nvme(fake, address, replace(nvme, block_size=block_size))
        for name in fake.names(f"{_DEVICES}/{address}/nvme"):
            fake.add(f"{_BLOCK}/{name}n1/queue/logical_block_size", str(block_size))
        return 0
    return _INVALID_OPCODE


def _identify(nvme: FakeNvme, nsid: int, cns: int) -> bytes:
    data = bytearray(4096)
    if cns == 0x01:
        struct.pack_into("<H", data, 256, (2 if nvme.formats else 0) | 8)
    elif cns == 0x00:
        data[25] = 1
        struct.pack_into("<HB", data, 128, 0, 9)
        struct.pack_into("<HB", data, 132, 0, 12)
    else:
        ids = sorted({*nvme.active, *(nvme.inactive if cns == 0x10 else ())})
        struct.pack_into(f"<{len(ids)}I", data, 0, *ids)
    return bytes(data)


def _folder(fake: FakeRoot) -> Path:
    return fake.path.parent / f"{fake.path.name}-disks"


def _find_index(fake: FakeRoot, address: str) -> int:
    """The same each time, unlike the kernel's: hosts are compared as text."""
    return sorted(os.listdir(_folder(fake))).index(address)
