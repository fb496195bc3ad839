"""The manager is killed at random points of random operations: no guest, core, page, VF or address is ever lost or doubled.

benchmarks/crash_runs.py does a thousand of these runs, and one alone again by its seed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator.domain import build_domain
from orchestrator.errors import HypervisorError
from orchestrator.guests.host_setup import HOST
from orchestrator.guests.service import GuestService
from orchestrator.images.store import find_image
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.request import DiskRequest, GuestRequest, parse_guest_request
from orchestrator.model.state import GuestState
from tests.fakes.nvme import disk_file
from tests.fakes.server import CLOUD_IMAGE, IMAGE
from tests.harness.crash import World, in_child, measure_recovery, run_crash, wait_wiped

Tell = Callable[..., None]
QUIET_SEED = 0
"""With it the guest does not end and the host does not boot while no manager runs."""


@pytest.mark.parametrize("seed", range(30))
def test_killed_manager_loses_nothing(tmp_path: Path, seed: int) -> None:
    outcome = run_crash(tmp_path / "world", seed)
    assert not outcome.faults, f"seed {seed}, killed {outcome.point!r} during {outcome.operation!r}"


def cheat_pages(world: World, _tell: Tell) -> None:
    """On the other node, since the manager waits for those of its own to come back."""
    pool = "sys/devices/system/node/node1/hugepages/hugepages-2048kB/free_hugepages"
    world.host.add(pool, str(int(world.host.text(pool)) - 1))


def cheat_record(world: World, _tell: Tell) -> None:
    world.open_manager()[1].add_undo_record("guest9", "vf-mac", {"interface": "nic0", "index": 5, "mac": ""})


def cheat_host(world: World, _tell: Tell) -> None:
    """Kernel threads that nobody gives their CPUs back."""
    _, ledger = world.open_manager()
    for record in ledger.undo_records(HOST):
        if record.action == "thread-affinity":
            ledger.drop_undo_record(record.id)


def cheat_claim(world: World, _tell: Tell) -> None:
    """A guest that runs, and that nobody knows."""
    _, ledger = world.open_manager()
    for record in ledger.undo_records("guest0"):
        ledger.drop_undo_record(record.id)
    ledger.set_state("guest0", GuestState.DELETING)
    ledger.release("guest0")


def cheat_promise(_world: World, tell: Tell) -> None:
    """A guest that was promised, and is not there."""
    tell(begin="create", name="guest3")
    tell(done="create", name="guest3", exists=True)


def cheat_lost_file(world: World, tell: Tell) -> None:
    """A guest whose user data is gone."""
    tell(begin="create", name="guest1")
    request = parse_guest_request({"name": "guest1", "memory": "64M", "image": CLOUD_IMAGE, "user_data": "#cloud-config"})
    world.open_manager()[0].create(OPERATOR, request)
    for file in world.secrets.glob("*.json"):
        file.unlink()


def cheat_left_file(world: World, _tell: Tell) -> None:
    """User data of a guest that has none."""
    manager, _ = world.open_manager()
    world.secrets.mkdir()
    (world.secrets / f"{manager.guest(OPERATOR, 'guest0').plan.uuid}.json").write_text("{}")


def cheat_cores(world: World, _tell: Tell) -> None:
    """Two guests on one core."""
    manager, _ = world.open_manager()
    plan = manager.guest(OPERATOR, "guest0").plan
    with pytest.raises(HypervisorError, match="in use by guest0"):
        world.hypervisor.create_paused(
            build_domain(
                replace(plan, name="guest1", uuid=uuid4()),
                find_image(world.folder / "images", IMAGE),
                world.server.policy.housekeeping,
                log=Path(),
            )
        )


def cheat_disk(world: World, _tell: Tell) -> None:
    """A disk that is given back with the data of its guest."""
    with disk_file(world.host, "0000:50:00.0").open("r+b") as file:
        file.write(b"data")


def cheat_wipe(world: World, _tell: Tell) -> None:
    """A guest that gets a disk with the data of another."""
    manager, ledger = world.open_manager()
    manager.create(OPERATOR, GuestRequest(name="guest1", memory="64M", image=IMAGE, disks=(DiskRequest(serial="disk0"),)))
    data = disk_file(world.host, "0000:50:00.0").read_bytes()
    manager.delete(OPERATOR, "guest1")
    wait_wiped(ledger)
    manager.create(OPERATOR, GuestRequest(name="guest2", memory="64M", image=IMAGE, disks=(DiskRequest(serial="disk0"),)))
    manager.stop(OPERATOR, "guest2", 0)
    disk_file(world.host, "0000:50:00.0").write_bytes(data)
    with pytest.raises(HypervisorError, match="holds data of guest"):
        manager.start(OPERATOR, "guest2")


def run_with(folder: Path, monkeypatch: pytest.MonkeyPatch, cheat: Callable[[World, Tell], None]) -> list[str]:
    """The faults of a run in which a manager makes one guest, cheats and is killed."""

    def work(world: World, _rng: object, _points: int, tell: Tell) -> None:
        tell(begin="create", name="guest0")
        world.open_manager()[0].create(OPERATOR, GuestRequest(name="guest0", memory="64M", image=IMAGE))
        tell(done="create", name="guest0", exists=True)
        cheat(world, tell)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("tests.harness.crash.work_until_killed", work)
    return run_crash(folder, QUIET_SEED).faults


def test_harness_without_planted_loss_reports_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_with(tmp_path / "world", monkeypatch, lambda _world, _tell: None) == []


@pytest.mark.parametrize(
    ("cheat", "fault"),
    [
        (cheat_pages, "the host is not as before: {'sys/devices/system/node/node1/hugepages"),
        (cheat_record, "1 records are left in the undo journal"),
        (cheat_host, "the host is not as before: {'proc/"),
        (cheat_claim, "running by the ledger: [], in truth: ['guest0']"),
        (cheat_promise, "guests that were promised are lost: ['guest3']"),
        (cheat_lost_file, "files of guests are lost: ['"),
        (cheat_left_file, "files of guests that need none: ['"),
        (cheat_cores, "guest1: CPUs 2-3 are in use by guest0"),
        (cheat_disk, "after all guests were deleted disks hold data: ['0000:50:00.0']"),
        (cheat_wipe, "guest2: disk 0000:50:00.0 holds data of guest"),
    ],
)
def test_harness_with_planted_loss_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheat: Callable[[World, Tell], None], fault: str
) -> None:
    """The harness itself: each kind of loss, made on purpose, is a fault."""
    assert fault in "\n".join(run_with(tmp_path / "world", monkeypatch, cheat))


def test_harness_reports_a_recovery_that_ends_a_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recover(world: World, _manager: GuestService, _ledger: Ledger) -> None:
        for uuid in world.hypervisor.running_uuids():
            world.hypervisor.destroy(uuid)

    replace_recovery(monkeypatch, recover)
    faults = run_with(tmp_path / "world", monkeypatch, lambda _world, _tell: None)
    assert "guests that ran: ['guest0'], after the recovery: []" in faults


def replace_recovery(monkeypatch: pytest.MonkeyPatch, recover: Callable[[World, GuestService, Ledger], None]) -> None:
    """Managers that are opened from now on recover in another way."""
    open_manager = World.open_manager

    def open_other(world: World, *arguments: Any) -> tuple[GuestService, Ledger]:
        manager, ledger = open_manager(world, *arguments)
        monkeypatch.setattr(manager.reconciler, "recover", lambda: recover(world, manager, ledger))
        return manager, ledger

    monkeypatch.setattr(World, "open_manager", open_other)


def start_all_again(_world: World, manager: GuestService, ledger: Ledger) -> None:
    """Stops each guest, and starts it again."""
    for claim in ledger.read().claims:
        manager.transitions.start(manager.transitions.stop(claim, "cheat", 0), "cheat")


def test_harness_reports_a_recovery_that_restarts_a_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_recovery(monkeypatch, start_all_again)
    faults = run_with(tmp_path / "world", monkeypatch, lambda _world, _tell: None)
    assert "guests that ran were ended and started again: ['guest0']" in faults


def test_harness_reports_a_restart_among_many_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harness.crash.work_until_killed", lambda *_, **__: None)
    replace_recovery(monkeypatch, start_all_again)
    with pytest.raises(AssertionError, match="started again"):
        measure_recovery(tmp_path / "world", guests=1, times=1)


def test_failed_child_reports_its_traceback() -> None:
    def fail(_tell: object) -> None:
        raise ValueError("on purpose")

    status, text = in_child(fail)
    assert status == 1
    assert "on purpose" in text


def kill_before_resume(world: World) -> None:
    """From now on whoever lets a guest run is killed just before."""

    def watch(moment: str, what: str) -> None:
        if moment == "before" and what.startswith("hypervisor resume"):
            os.kill(os.getpid(), signal.SIGKILL)

    object.__setattr__(world.host, "watch", watch)


def test_guest_keeps_running_when_the_recovery_is_killed_too(tmp_path: Path) -> None:
    world = World(tmp_path / "world")

    def create(_tell: Tell) -> None:
        kill_before_resume(world)
        world.open_manager()[0].create(OPERATOR, GuestRequest(name="guest0", memory="64M", image=IMAGE))

    def recover(_tell: Tell) -> None:
        kill_before_resume(world)
        world.open_manager()[0].reconciler.recover()

    for work in (create, recover):
        assert in_child(work)[0] == -signal.SIGKILL
        assert world.hypervisor.paused() == {"guest0"}
    world.open_manager()[0].reconciler.recover()
    assert world.hypervisor.paused() == frozenset()
    assert world.hypervisor.running_names() == {"guest0"}


def test_stopped_guest_starts_on_a_prepared_host_after_a_power_cut(tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    manager, ledger = world.open_manager()
    manager.create(OPERATOR, GuestRequest(name="guest0", memory="64M", image=IMAGE))
    manager.stop(OPERATOR, "guest0", 5)
    ledger.close()
    world.reboot()
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    manager.start(OPERATOR, "guest0")
    manager.delete(OPERATOR, "guest0")
    assert world.host.violations() == []
