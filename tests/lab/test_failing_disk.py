"""Disks that fail on the real kernel: QEMU's blkdebug makes reads fail, and a disk is unplugged while it is read or wiped."""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from orchestrator.lab.qemu import SPARE_PORT
from orchestrator.lab.qmp import ask
from orchestrator.ssh import Completed
from tests.lab.conftest import LabHost
from tests.lab.test_disks import find_block
from tests.lab.test_manager import MEMORY

pytestmark = pytest.mark.soak

NAME, SERIAL, NODE, GROUP = "failing", "nohype-bad", "bad", "bad-limits"
SIZE = 64 << 20
SLOW = 4 << 20  # bytes per second: a disk is released 5 s after the unplug (pciehp, as after the attention button)
DISK = ("--disk", f"serial={SERIAL}")
MARK = f"/var/lib/nohype/reserved-disks/nvme-{SERIAL}"


def until(true: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def plug(host: LabHost, **error: object) -> None:
    """A disk of zeros; with the fields of an `inject-error` of blkdebug."""
    errors = {"inject-error": [{"event": "none", "errno": 5, "immediately": True, **error}]} if error else {}
    file = {"driver": "blkdebug", "image": {"driver": "null-co", "size": SIZE, "read-zeroes": True}, **errors}
    ask(host.lab.folder.qmp, "object-add", arguments={"qom-type": "throttle-group", "id": GROUP, "limits": {}})
    node = {"driver": "throttle", "node-name": NODE, "throttle-group": GROUP, "file": file}
    ask(host.lab.folder.qmp, "blockdev-add", arguments=node)
    device = {"driver": "nvme", "id": NODE, "serial": SERIAL, "drive": NODE, "bus": SPARE_PORT}
    ask(host.lab.folder.qmp, "device_add", arguments=device)
    until(lambda: find_block(host, SERIAL) != "/dev/")


def slow_down(host: LabHost) -> None:
    arguments = {"path": f"/objects/{GROUP}", "property": "limits", "value": {"bps-total": SLOW}}
    ask(host.lab.folder.qmp, "qom-set", arguments=arguments)


def is_plugged(host: LabHost) -> bool:
    devices = ask(host.lab.folder.qmp, "qom-list", arguments={"path": "/machine/peripheral"})
    return NODE in [device["name"] for device in devices]


def unplug(host: LabHost) -> None:
    """Returns when the kernel has released the disk."""
    monitor = host.lab.folder.qmp
    ask(monitor, "device_del", arguments={"id": NODE})
    until(lambda: not is_plugged(host))
    ask(monitor, "blockdev-del", arguments={"node-name": NODE})
    ask(monitor, "object-del", arguments={"id": GROUP})


@contextmanager
def plugged(host: LabHost, **error: object) -> Iterator[None]:
    plug(host, **error)
    try:
        yield
    finally:
        unplug(host)


@pytest.fixture(autouse=True)
def nothing_left(host: LabHost) -> Iterator[None]:
    """Also after a failure."""
    yield
    if find_guest(host):
        host.nohype("guest", "delete", NAME, check=False)
        host.nohype("quarantine", "clear", "--force", NAME, check=False)
    if is_plugged(host):
        unplug(host)


def find_guest(host: LabHost) -> dict[str, Any] | None:
    guests = json.loads(host.nohype("guest", "list", "--json").stdout)
    return next((guest for guest in guests if guest["name"] == NAME), None)


def create(host: LabHost) -> Completed:
    return host.nohype("guest", "create", NAME, *MEMORY, *DISK, check=False)


def test_unreadable_sector_refuses_the_disk(host: LabHost) -> None:
    """In the middle, which the survey does not read."""
    with plugged(host, sector=SIZE // 2 // 512, iotype="read"):
        done = create(host)
        assert done.status
        assert f"at offset {SIZE // 2}" in done.stderr, done.stderr
        assert "smartctl" in done.stderr
        assert find_guest(host) is None
        assert (
            host.run(f"cat /sys/class/block/{find_block(host, SERIAL)[5:]}/device/device/driver_override").stdout.strip()
            == "(null)"
        )


def test_disk_unplugged_while_it_is_checked_fails_the_creation(host: LabHost) -> None:
    plug(host)
    slow_down(host)
    results: list[Completed] = []
    line = shlex.join(["nohype", "guest", "create", NAME, *MEMORY, *DISK])
    # Not by `host.nohype`, which runs one command at a time.
    thread = threading.Thread(target=lambda: results.append(host.run(line, check=False)))
    thread.start()
    until(lambda: (guest := find_guest(host)) and guest.get("progress"))
    unplug(host)
    thread.join(300)
    (done,) = results
    assert done.status
    assert "Traceback" not in done.stderr
    until(lambda: find_guest(host) is None)
    assert host.run(f"ls {MARK}", check=False).status, "the host examines the disk when it is back"


def test_disk_unplugged_while_it_is_wiped_is_quarantined_until_it_is_back(host: LabHost) -> None:
    plug(host)
    assert create(host).status == 0
    slow_down(host)
    host.nohype("guest", "delete", NAME)
    until(lambda: (guest := find_guest(host)) and guest.get("progress"))
    unplug(host)
    until(lambda: (guest := find_guest(host)) and guest["state"] == "quarantined")
    reasons = host.nohype("quarantine", "list").stdout
    assert "disappeared" in reasons or SERIAL in reasons
    with plugged(host):
        host.nohype("quarantine", "clear", NAME)
        until(lambda: find_guest(host) is None)
        assert host.run(f"ls {MARK}", check=False).status
