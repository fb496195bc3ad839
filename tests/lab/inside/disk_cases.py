"""Runs on the lab host: makes each kind of use on the disk nohype-disk0, and prints what the product says of it, as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.host.disk_use import find_users
from orchestrator.host.nvme import read_controllers
from orchestrator.host.nvme_binding import release_controller, reserve_controller
from orchestrator.host.root import HostRoot
from orchestrator.host.signatures import find_signatures
from orchestrator.model.plan import DiskPlan
from orchestrator.model.topology import NvmeController
from orchestrator.resources.disk import Contents, check_disk

HOST, SERIAL, MOUNT = HostRoot(), "nohype-disk0", Path("/run/nohype-case")
GROUP = "nohype-case"
PROCESSES: list[subprocess.Popen[bytes]] = []
DESCRIPTORS: list[int] = []
"""What uses the disk in the present case."""
# dm-multipath(8): no features, no hardware handler, one group of one path.
_MULTIPATH = "0 {sectors} multipath 0 0 1 1 round-robin 0 1 1 {device} 1"


def find_disk() -> NvmeController:
    return next(one for one in read_controllers(HOST) if one.serial == SERIAL)


def sh(line: str) -> None:
    done = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise OSError(f"{line}: {done.stdout}{done.stderr}")


def write(device: str, offset: int, data: bytes) -> None:
    with open(device, "r+b") as file:
        file.seek(offset)
        file.write(data)


def list_cases(device: str, size: int) -> Iterator[tuple[str, Callable[[], object], str]]:
    """Name, what makes it, and the line of shell that ends it."""
    ext4 = f"mkfs.ext4 -qF {device}"
    lvm = f"vgcreate -q {GROUP} {device} && lvcreate -q -Wy --yes -L 8M -n data {GROUP}"
    end_lvm = f"vgremove -qf {GROUP}"
    partition = f"printf 'label: gpt\\n,48M\\n' | sfdisk -q {device} && udevadm settle"
    on_partition = f"{partition}; vgcreate -q {GROUP} {device}p1 && lvcreate -q -Wy --yes -L 8M -n data {GROUP}"
    md = f"mdadm --quiet --create /dev/md77 --run --level=1 --metadata=1.2 --raid-devices=2 {device} missing"
    sectors = size // 512

    def shell(line: str) -> Callable[[], object]:
        return lambda: sh(line)

    yield "LVM, active", shell(lvm), end_lvm
    yield "LVM, inactive", shell(f"{lvm} && vgchange -q -an {GROUP}"), end_lvm
    yield "LVM on a partition, active", shell(on_partition), end_lvm
    yield "LVM on a partition, inactive", shell(f"{on_partition} && vgchange -q -an {GROUP}"), end_lvm
    yield "md, active", shell(md), "mdadm --quiet --stop /dev/md77"
    yield "md, stopped", shell(f"{md} && mdadm --quiet --stop /dev/md77"), ""
    yield "swap, used", shell(f"mkswap -q {device} && swapon {device}"), f"swapoff {device}"
    yield "swap, not used", shell(f"mkswap -q {device}"), ""
    yield "ext4", shell(ext4), ""
    yield "mounted", shell(f"{ext4} && mount {device} {MOUNT}"), f"umount {MOUNT}"
    yield "partition mounted", shell(f"{partition}; mkfs.ext4 -qF {device}p1 && mount {device}p1 {MOUNT}"), f"umount {MOUNT}"
    sleep = ["sh", "-ec", f"mount {device} {MOUNT}; exec sleep 600"]

    def mount_elsewhere() -> None:
        sh(ext4)
        process = subprocess.Popen(["unshare", "--mount", "--propagation", "private", *sleep], stdin=subprocess.DEVNULL)
        PROCESSES.append(process)
        deadline = time.monotonic() + 60
        while f" {MOUNT} " not in Path(f"/proc/{process.pid}/mountinfo").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)

    yield "mounted in another mount namespace", mount_elsewhere, ""
    yield "GPT", shell(partition), ""
    yield "MBR", shell(f"printf 'label: dos\\n,8M\\n' | sfdisk -q {device}"), ""
    mapped, unmap = f"dmsetup create {GROUP} --table", f"dmsetup remove {GROUP}"
    yield "device mapper, linear", shell(f"{mapped} '0 {sectors} linear {device} 0'"), unmap
    multipath = _MULTIPATH.format(sectors=sectors, device=device)
    yield "device mapper, multipath", shell(f"modprobe dm-multipath; {mapped} '{multipath}'"), unmap
    yield "loop device", shell(f"losetup -f {device}"), f"losetup -d $(losetup -nO NAME -j {device})"
    yield "opened by a program", lambda: open_by_program(device), ""
    yield "opened for exclusive use", lambda: DESCRIPTORS.append(os.open(device, os.O_EXCL)), ""
    # libblkid: superblocks/luks.c, superblocks/bcache.c.
    yield "LUKS", lambda: write(device, 0, b"LUKS\xba\xbe\0\2".ljust(4096, b"\0")), ""
    yield "bcache", lambda: make_bcache(device), ""
    yield "ZFS", lambda: make_zfs(device, size), ""
    yield "data of an unknown format at the start", lambda: write(device, 8192, b"a raw database"), ""
    yield "data of an unknown format at the end", lambda: write(device, size - 4096, b"a raw database"), ""


def open_by_program(device: str) -> None:
    with open(device, "rb") as file:
        PROCESSES.append(subprocess.Popen(["sleep", "600"], stdin=file))


def end_holders() -> None:
    while PROCESSES:
        process = PROCESSES.pop()
        process.kill()
        process.wait()
    while DESCRIPTORS:
        os.close(DESCRIPTORS.pop())


def make_bcache(device: str) -> None:
    # include/uapi of bcache: csum, offset (sector 8), version, magic; libblkid checks the offset, and from 2.38 on the csum.
    magic = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
    body = (8).to_bytes(8, "little") + (1).to_bytes(8, "little") + magic + bytes(16) + bytes(16) + bytes(32) + bytes(8) * 3
    body = body.ljust(0xD0 - 8, b"\0")
    write(device, 4096, (crc64(body) ^ (1 << 64) - 1).to_bytes(8, "little") + body)


def crc64(data: bytes) -> int:
    # lib/crc64.c of the kernel, crc64_be: polynomial of ECMA-182; bcache starts with all ones and inverts the result.
    value = (1 << 64) - 1
    for byte in data:
        value ^= byte << 56
        for _ in range(8):
            value = (value << 1 ^ (0x42F0E1EBA9EA3693 if value >> 63 else 0)) & (1 << 64) - 1
    return value


def make_zfs(device: str, size: int) -> None:
    # libblkid, superblocks/zfs.c: at least 4 uberblocks in the labels, of 256 KiB each, two at the start and two at the end.
    uberblock = (0x00BAB10C).to_bytes(8, "little") + (5000).to_bytes(8, "little")
    for label in (0, 1, 2, 3):
        base = label * 262144 if label < 2 else size - (4 - label) * 262144
        for number in range(8):
            write(device, base + 131072 + number * 1024, uberblock)


def describe(controller: NvmeController) -> dict[str, str]:
    device = f"/dev/{controller.namespaces[0].device}"
    before = digest(device)
    said = "; ".join((*find_users(HOST, controller), *find_signatures(HOST, controller)))
    refused = ""
    try:
        reserve_controller(HOST, controller.address, SERIAL)
        disk = DiskPlan(controller.size, SERIAL, controller.address)
        check_disk(HOST, disk, Contents(), lambda _: None)
    except OrchestratorError as error:
        refused = error.message
    finally:
        release_controller(HOST, controller.address)
    return {"plan": said, "hand-over": refused, "changed": "" if digest(device) == before else "its contents have changed"}


def digest(device: str) -> str:
    # The superblock of what is mounted changes by itself.
    with open(device, "rb") as file:
        file.seek(1 << 20)
        return hashlib.sha256(file.read()).hexdigest()


def clear(device: str) -> None:
    sh(f"udevadm settle; dd if=/dev/zero of={device} bs=1M oflag=direct status=none || true")
    sh(f"blockdev --flushbufs --rereadpt {device}; udevadm settle")


def main() -> None:
    MOUNT.mkdir(exist_ok=True)
    controller = find_disk()
    device, size = f"/dev/{controller.namespaces[0].device}", controller.size.bytes
    found: dict[str, dict[str, str]] = {}
    clear(device)
    found["clean"] = describe(controller)
    for name, make, end in list_cases(device, size):
        try:
            make()
            found[name] = describe(controller)
        except OSError as error:
            found[name] = {"failed": str(error)}
        finally:
            end_holders()
            subprocess.run(["sh", "-c", end], capture_output=True, timeout=120, check=False)
            clear(device)
    MOUNT.rmdir()
    print(json.dumps(found))


main()
