"""The NVMe controllers of the host with their use, over the API; a fleet counts them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.guests import host_view
from orchestrator.host.block import BlockProgress
from orchestrator.host.nvme import read_controllers
from orchestrator.resources import disk as disk_module
from tests.fakes.nvme import disk_file
from tests.fakes.server import IMAGE
from tests.harness.api_server import Served, serve
from tests.harness.crash import World, wait_wiped
from tests.harness.guests import until

DISKS = ("0000:50:00.0", "0000:51:00.0", "0000:52:00.0")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(host_view, "VIEW_AGE", 0.0)  # each request reads anew; the survey is as old as on a host
    with serve(tmp_path) as found:
        yield found


def list_uses(served: Served) -> list[tuple[str, str]]:
    host = served.client.host()
    assert tuple(disk["address"] for disk in host["disks"]) == DISKS
    assert [disk["node"] for disk in host["disks"]] == [0, 1, 0]
    return [(disk["use"], disk["guest"]) for disk in host["disks"]]


def create(served: Served, name: str = "web", serial: str = "disk0") -> None:
    served.client.create({"name": name, "image": IMAGE, "memory": "64M", "disks": [{"serial": serial}]})


def test_disk_is_never_unusable_while_guests_come_and_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A survey from before the change shows another driver."""
    release, erase = threading.Event(), disk_module.scrub_controller

    def wait(*words: object) -> object:
        assert release.wait(60)
        return erase(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(disk_module, "scrub_controller", wait)
    others = [("free", "")] * 2
    for _ in range(3):
        release.clear()
        assert list_uses(served) == [("free", ""), *others]
        create(served)
        assert list_uses(served) == [("claimed", "web"), *others]
        served.client.delete("web")
        assert list_uses(served) == [("wiping", "web"), *others]
        release.set()
        wait_wiped(served.ledger)
        assert list_uses(served) == [("free", ""), *others]


def test_disk_that_is_released_while_the_host_is_read_is_shown_with_its_guest(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(served)

    def read_and_then_delete(*words: object) -> object:
        found = read_controllers(*words)  # type: ignore[arg-type]
        served.client.delete("web")
        wait_wiped(served.ledger)
        return found

    monkeypatch.setattr(host_view, "read_controllers", read_and_then_delete)
    assert list_uses(served)[0] == ("claimed", "web")


def test_disk_with_contents_is_unusable_and_says_why(served: Served) -> None:
    with disk_file(served.world.host, DISKS[1]).open("r+b") as file:
        file.seek(4086)
        file.write(b"SWAPSPACE2")
    assert list_uses(served) == [("free", ""), ("unusable", ""), ("free", "")]
    assert served.client.host()["disks"][1]["why"].startswith("not empty: nvme1n1 contains ")


def test_examinations_of_disks_do_not_overlap(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each opens a disk exclusively; two at the same time would report each other as a use of the host."""
    running, most = [], []
    examine: Callable[..., object] = served.manager.allocator.read_disk_use.__globals__["read_disk_use"]

    def watch(*words: object, **more: object) -> object:
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.05)
        running.pop()
        return examine(*words, **more)

    monkeypatch.setitem(served.manager.allocator.read_disk_use.__globals__, "read_disk_use", watch)
    threads = [threading.Thread(target=create, args=[served, f"web{number}", f"disk{number}"]) for number in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(most) >= 2)
    for thread in threads:
        thread.join()
    assert max(most) == 1


@pytest.mark.parametrize("writes", [False, True])
def test_guest_whose_disks_are_being_prepared_can_be_deleted(
    served: Served, monkeypatch: pytest.MonkeyPatch, *, writes: bool
) -> None:
    """Its disks are read as a whole, which takes hours if they are large."""

    def work(*words: Any, **_more: Any) -> None:
        while True:
            words[-1](BlockProgress("nvme0n1", "verify", 1, 2))
            threading.Event().wait(0.01)

    if writes:
        to_report = disk_module.to_report
        monkeypatch.setattr(disk_module.FillDisk, "apply", lambda step, _host: work(to_report(step.progress, "disk0")))
    else:
        monkeypatch.setattr(disk_module, "find_data", work)
    errors: list[OrchestratorError] = []

    def try_to_create() -> None:
        try:
            create(served)
        except OrchestratorError as error:
            errors.append(error)

    thread = threading.Thread(target=try_to_create)
    thread.start()
    until(lambda: [guest for guest in served.client.guests() if guest["progress"]])
    assert served.client.guest("web")["state"] == "creating"
    served.client.delete("web")
    thread.join(60)
    assert "the guest was deleted while its disks were being prepared" in errors[0].message
    wait_wiped(served.ledger)
    assert list_uses(served) == [("free", "")] * 3
    assert served.world.count_undo_records() == 0


@pytest.mark.parametrize(("settings", "offers"), [({}, False), ({"disk_folder": "/disks"}, True), ({"disk_group": "vg"}, True)])
def test_emulated_disks_are_offered_if_configured(tmp_path: Path, settings: dict[str, Any], *, offers: bool) -> None:
    world = World(tmp_path / "world")
    with serve(tmp_path, world=world, policy=replace(world.server.policy, **settings)) as served:
        assert served.client.host()["emulated_disks"] is offers
