"""Images that a user brings, imported on the host and booted by the manager until SSH answers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from orchestrator.images.cache import cache_folder
from orchestrator.images.store import STORE, Image
from orchestrator.lab import lab as labs
from orchestrator.lab.qemu import INSIDE, SPARE_PORT
from orchestrator.lab.qmp import ask
from tests.harness.firmware_image import BOOTED, FILE, build_firmware_image, size
from tests.lab.conftest import LabHost

# The fixture `image` too: the image debian in the lab's store.
from tests.lab.test_debian_image import image
from tests.lab.test_disks import find_block, wait_released
from tests.lab.test_failing_disk import until

__all__ = ["image"]

pytestmark = pytest.mark.soak

NAME, SERIAL, NODE = "brought", "nohype-large", "large"
ADDRESS = "10.9.0.51"
FOLDER = "/var/tmp/brought"
STORED = STORE / "debian"


@dataclass(frozen=True)
class Brought:
    """How an image is imported: words of `nohype image import`, and what the kernel's command line contains."""

    words: str
    cmdline: str
    has_disk: bool = True


@pytest.fixture(scope="module", autouse=True)
def large_disk(host: LabHost, image: Image) -> Iterator[None]:
    """An NVMe controller that is large enough for a Debian system."""
    monitor, file = host.lab.folder.qmp, host.lab.folder.path / NODE
    with file.open("wb") as empty:
        empty.truncate(size(image))
    protocol = {"driver": "file", "filename": f"{INSIDE}/lab/{NODE}"}
    ask(monitor, "blockdev-add", arguments={"driver": "raw", "node-name": NODE, "discard": "unmap", "file": protocol})
    ask(monitor, "device_add", arguments={"driver": "nvme", "id": NODE, "serial": SERIAL, "drive": NODE, "bus": SPARE_PORT})
    until(lambda: find_block(host, SERIAL) != "/dev/")
    yield
    ask(monitor, "device_del", arguments={"id": NODE})
    peripherals = {"path": "/machine/peripheral"}
    until(lambda: NODE not in [device["name"] for device in ask(monitor, "qom-list", arguments=peripherals)])
    ask(monitor, "blockdev-del", arguments={"node-name": NODE})
    file.unlink()


@pytest.fixture(scope="module")
def key(host: LabHost, image: Image) -> Iterator[str]:
    """A key for SSH, in a folder with the disk image; the host gets an address on the uplink."""
    with build_firmware_image(image, cache_folder()).open("rb") as file:
        done = labs.execute(host.lab, f"mkdir -p {FOLDER} && cat >{FOLDER}/{FILE}", timeout=300, input=file)
    assert done.status == 0, done.stderr
    host.run(f"rm -f {FOLDER}/key && ssh-keygen -q -t ed25519 -N '' -f {FOLDER}/key")
    with host.changed("ip address add 10.9.0.100/24 dev nic0", "ip address delete 10.9.0.100/24 dev nic0"):
        yield f"{FOLDER}/key"
    host.run(f"rm -r {FOLDER}")


@pytest.fixture(autouse=True)
def nothing_left(host: LabHost) -> Iterator[None]:
    """Also after a failure."""
    yield
    if not host.nohype("guest", "delete", NAME, check=False).status:
        wait_released(host, NAME)
    host.nohype("image", "delete", NAME, check=False)


def list_ways(image: Image) -> dict[str, Brought]:
    given = f"--kernel {STORED}/vmlinuz --cmdline {shlex.quote(image.cmdline + ' nohype.test=given')}"
    return {
        "firmware": Brought(f"{FOLDER}/{FILE}", BOOTED),
        "kernel": Brought(f"{FOLDER}/{FILE} {given} --initrd {STORED}/initrd", "root=UUID="),
        "initramfs": Brought(f"{given} --initrd {STORED}/ram-initrd", "nohype.test=given", has_disk=False),
    }


@pytest.mark.parametrize("way", ["firmware", "kernel", "initramfs"])
def test_guest_of_an_imported_image_answers_ssh(host: LabHost, image: Image, key: str, way: str) -> None:
    assert image.ram_root
    brought = list_ways(image)[way]
    host.run(f"nohype image import {NAME} {brought.words} --memory 256M --ready notify --configuration credentials")
    shown = json.loads(host.nohype("image", "show", NAME, "--json").stdout)
    assert shown["boot"] == ("firmware" if way == "firmware" else "direct")
    memory = "256M" if brought.has_disk else str(image.ram_root.min_memory)
    disk = ["--disk", f"serial={SERIAL}"] if brought.has_disk else []
    words = ["--image", NAME, "--memory", memory, "--address", f"{ADDRESS}/24", "--ssh-key", f"{key}.pub", *disk]
    host.nohype("guest", "create", NAME, *words, "--wait", "600", timeout=700)
    line = "cat /proc/cmdline; grep ' / ' /proc/mounts"
    cmdline, root = host.nohype("guest", "ssh", "--identity", key, NAME, "--", line).stdout.splitlines()
    assert brought.cmdline in cmdline
    assert root.split()[2] == ("ext4" if brought.has_disk else "rootfs")
    assert ("<kernel>" in host.run(f"virsh dumpxml {NAME}").stdout) == (way != "firmware")
