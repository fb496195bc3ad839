"""udev does not examine a disk that the manager owns: the host role's rule on the real udev."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.conftest import LabHost

SERIAL = "nohype-disk1"
PROGRAM = """
from orchestrator.host.nvme import read_controllers
from orchestrator.host.nvme_binding import release_controller, reserve_controller
from orchestrator.host.root import HostRoot
host = HostRoot()
disk = next(one for one in read_controllers(host) if one.serial == {serial!r})
{call}
"""


def call(host: LabHost, line: str) -> str:
    """Runs one line of the product's code, with `host` and `disk`, on the lab host."""
    return host.python(PROGRAM.format(serial=SERIAL, call=line)).strip()


@pytest.fixture
def device(host: LabHost) -> Iterator[str]:
    """The disk, with a swap signature."""
    name = f"/dev/{call(host, 'print(disk.namespaces[0].device)')}"
    host.run(f"mkswap -q {name} && udevadm settle")
    yield name
    call(host, "release_controller(host, disk.address)")
    # Not wipefs(8): it leaves the rest of the swap header, and a disk that is not empty is given to no guest.
    host.run(f"dd if=/dev/zero of={name} bs=1M count=1 oflag=direct conv=fsync status=none && udevadm settle")


def read_type(host: LabHost, device: str) -> str:
    """What udev has found on the device."""
    return host.run(f"udevadm settle && udevadm info --query=property --property=ID_FS_TYPE --value {device}").stdout.strip()


def test_udev_leaves_a_reserved_disk_alone(host: LabHost, device: str) -> None:
    assert read_type(host, device) == "swap"
    call(host, "reserve_controller(host, disk.address, disk.serial)")
    host.run(f"udevadm trigger --settle {device}")
    assert read_type(host, device) == ""
    # As after a reboot: the override is lost.
    host.run(
        f"echo > /sys/bus/pci/devices/{call(host, 'print(disk.address)')}/driver_override && udevadm trigger --settle {device}"
    )
    assert read_type(host, device) == ""
    call(host, "release_controller(host, disk.address)")
    assert read_type(host, device) == "swap"
