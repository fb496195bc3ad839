"""What becomes of guests that end, of what can't be cleaned, and of what a killed manager had begun: on a fake host."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.access import MANAGER, OPERATOR, Identity, Quota, Role
from orchestrator.errors import Conflict, HostError, HypervisorError, LedgerError, NoRoom, NotFound, QuotaExceeded
from orchestrator.host.processes import read_process_threads
from orchestrator.hypervisor import End, LiveGuest
from orchestrator.ledger import Ledger
from orchestrator.lifecycle import manager as manager_module
from orchestrator.lifecycle import pages as pages_module
from orchestrator.lifecycle import supervisor as supervisor_module
from orchestrator.lifecycle.core_manager import CoreManager
from orchestrator.lifecycle.manager import SystemManager
from orchestrator.lifecycle.refusals import MOST, RefusalLog
from orchestrator.planning.plan import Plan
from orchestrator.request import parse_guest_request
from orchestrator.state import GuestState
from orchestrator.steps.vfs import VFIO
from orchestrator.topology import VfState
from orchestrator.values import CpuSet
from tests.crashes import World
from tests.fakehost import IMAGE
from tests.fakeroot import DEVICES


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture
def opened(world: World) -> tuple[SystemManager, Ledger]:
    manager, ledger = world.open_manager()
    manager.supervisor.recover()
    world.hypervisor.watch_ends(manager.supervisor.ended)
    return manager, ledger


@pytest.fixture
def manager(opened: tuple[SystemManager, Ledger]) -> SystemManager:
    return opened[0]


@pytest.fixture
def ledger(opened: tuple[SystemManager, Ledger]) -> Ledger:
    return opened[1]


def create(manager: SystemManager, **fields: object) -> Plan:
    request = {"name": "web", "image": IMAGE, "memory": "64M", **fields}
    return manager.create(OPERATOR, parse_guest_request(request))[0].plan


def state(manager: SystemManager, name: str = "web") -> str:
    return manager.guest(OPERATOR, name).state


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kinds(manager: SystemManager) -> list[str]:
    return [event.kind for event in manager.events(OPERATOR)]


def spoil(world: World, plan: Plan) -> None:
    """Makes the guest's VF one that can't be reset, and so not be verified clean."""
    (world.host.path / DEVICES / str(plan.vf.address) / "reset").unlink()


def stop_on_paper(ledger: Ledger) -> None:
    """As if somebody else had started the guest: it is stopped as far as the ledger knows, and who started it does not matter."""
    for new in (GuestState.STOPPING, GuestState.STOPPED):
        ledger.set_state("web", new, restarts=0)


# Consoles


def test_what_another_guest_of_the_name_prints_is_not_told(
    world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> str:
        manager.delete(OPERATOR, "web")
        create(manager)
        return "nohype: ready secret"

    monkeypatch.setattr(manager_module, "wait_for", read)
    create(manager)
    with pytest.raises(NotFound, match="web that was asked is gone"):
        manager.wait_ready(OPERATOR, "web", 1)


def test_nothing_is_typed_on_the_console_of_another_guest_of_the_name(
    world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager)
    find = world.hypervisor.guest

    def swap(name: str) -> LiveGuest:
        monkeypatch.setattr(world.hypervisor, "guest", find)
        manager.delete(OPERATOR, name)
        create(manager)
        return find(name)

    monkeypatch.setattr(world.hypervisor, "guest", swap)
    typed: list[object] = []
    monkeypatch.setattr(manager_module, "tell", lambda *words, **_: typed.append(words))
    with pytest.raises(NotFound, match="web that was asked is gone"):
        manager.tell(OPERATOR, "web", "halt", 1)
    assert typed == []


# Ends


def test_a_guest_that_fails_is_started_again(world: World, manager: SystemManager) -> None:
    create(manager, restart="on-failure")
    world.hypervisor.end("web", End.FAILED)
    until(lambda: kinds(manager)[-2:] == ["ended", "started"])
    assert state(manager) == "running"


def test_a_guest_that_has_failed_and_then_powers_off_stays_off(world: World, manager: SystemManager, ledger: Ledger) -> None:
    """Its count of restarts says that it is to be started again; a power-off takes that back."""
    create(manager, restart="on-failure")
    world.hypervisor.end("web", End.FAILED)
    until(lambda: kinds(manager).count("started") == 2)
    world.hypervisor.end("web", End.POWERED_OFF)
    until(lambda: kinds(manager)[-1] == "ended")
    claim = ledger.find("web")
    assert claim
    assert (claim.state, claim.restarts) == (GuestState.STOPPED, 0)


def test_a_guest_that_powers_off_and_is_to_be_removed_is_gone(world: World, manager: SystemManager, ledger: Ledger) -> None:
    create(manager, remove=True)
    world.hypervisor.end("web", End.POWERED_OFF)
    until(lambda: not ledger.read().claims)


@pytest.mark.parametrize(("remove", "restart"), [(False, "on-failure"), (True, "never")])
def test_a_stop_that_was_cut_short_stays_a_stop(
    world: World, manager: SystemManager, ledger: Ledger, remove: bool, restart: str
) -> None:
    """The manager was killed after the guest had powered off and before it was cleaned up after it."""
    plan = create(manager, remove=remove, restart=restart)
    ledger.set_state("web", GuestState.STOPPING, restarts=0)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web", End.POWERED_OFF)
    ledger.close()
    manager, ledger = world.open_manager()
    manager.supervisor.recover()
    time.sleep(0.1)
    assert state(manager) == "stopped"
    assert manager.start(OPERATOR, "web").plan == plan


def test_a_failure_that_was_cut_short_is_still_a_failure(world: World, manager: SystemManager, ledger: Ledger) -> None:
    """It was noted that the guest is to be started again, and the manager was killed while it cleaned up."""
    create(manager, restart="on-failure")
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web", End.FAILED)
    ledger.set_state("web", GuestState.STOPPING, restarts=1)
    ledger.close()
    manager, _ = world.open_manager()
    manager.supervisor.recover()
    until(lambda: state(manager) == "running")


def test_a_guest_that_always_fails_is_given_up(
    world: World, manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "plan_pause", lambda restarts: None if restarts >= 2 else 0.01)
    create(manager, restart="on-failure")
    for number in (2, 3):
        world.hypervisor.end("web", End.FAILED)
        until(lambda: kinds(manager).count("started") == number)  # noqa: B023
    world.hypervisor.end("web", End.FAILED)
    until(lambda: kinds(manager)[-1] == "gave-up")
    assert state(manager) == "stopped"


# What is noticed now and then


def test_an_end_that_nobody_told_is_noticed(world: World, manager: SystemManager) -> None:
    create(manager)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web")
    manager.supervisor.collect()
    assert state(manager) == "ended", "it may be about to be told"
    manager.supervisor.collect()
    assert state(manager) == "stopped"


def test_an_end_that_is_told_late_is_what_is_told(world: World, manager: SystemManager, ledger: Ledger) -> None:
    """A look in between must not take a power-off for a failure."""
    plan = create(manager, restart="on-failure")
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web", End.POWERED_OFF)
    manager.supervisor.collect()
    manager.supervisor.ended(plan.uuid, End.POWERED_OFF)
    claim = ledger.find("web")
    assert claim
    assert (claim.state, claim.restarts) == (GuestState.STOPPED, 0)


def test_a_stop_takes_a_restart_back_for_good(
    world: World, manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for the next manager, and for a timer that waits for its turn."""
    monkeypatch.setattr(supervisor_module, "plan_pause", lambda _restarts: 60)
    create(manager, restart="on-failure")
    world.hypervisor.end("web", End.FAILED)
    until(lambda: state(manager) == "stopped")
    manager.stop(OPERATOR, "web", 1)
    manager.supervisor._restart("web")
    ledger.close()
    manager, ledger = world.open_manager()
    monkeypatch.setattr(supervisor_module, "plan_pause", lambda _restarts: 0.01)
    manager.supervisor.recover()
    time.sleep(0.2)
    assert state(manager) == "stopped"


def test_a_look_does_not_take_one_guest_for_another(
    world: World, manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it looks, the guest that it has read of is deleted, and another gets the name, and other cores."""
    create(manager)
    old = ledger.read()
    manager.delete(OPERATOR, "web")
    create(manager, name="other")
    plan = create(manager)
    assert plan.cpus != old.claims[0].plan.cpus
    monkeypatch.setattr(ledger, "read", lambda: old)
    manager.supervisor.check()
    assert [str(vcpu.pin) for vcpu in world.hypervisor.guest("web").vcpus] == [str(cpu) for cpu in plan.cpus]
    assert "drifted" not in kinds(manager)


def test_a_vf_that_somebody_changes_is_told_once_and_left(world: World, manager: SystemManager) -> None:
    """Some drivers reset a VF for it: that could hurt the guest."""
    vf = create(manager).vf
    net = world.host.fake_net

    def told() -> list[str]:
        manager.supervisor.links_changed()
        manager.supervisor.check()
        return [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"]

    assert told() == []
    net.set_vf(vf.interface, vf.index, vlan=7, spoof_check=False)
    assert told() == told() == ["its VF's vlan is 7 in place of 0; its VF's spoof check is off in place of on"]
    assert net.vfs(vf.interface)[vf.index].vlan == 7
    net.reset_vf(vf.interface, vf.index, vf.mac)
    assert told()[1:] == ["all is as it was"]


def test_a_vf_of_a_guest_that_is_started_again_meanwhile_has_not_changed(
    world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VFs are read once for all guests; a stop in between and a start after it are not taken for somebody's change."""
    create(manager)
    now, first = CoreManager.read_vfs, [dict[tuple[str, int], VfState]()]
    monkeypatch.setattr(CoreManager, "read_vfs", lambda self: first.pop() if first else now(self))
    manager.supervisor.links_changed()
    manager.supervisor.check()
    assert first == []
    assert "drifted" not in kinds(manager)


def test_vfs_are_read_only_when_a_link_has_changed(world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch) -> None:
    create(manager)
    manager.supervisor.links_changed()
    manager.supervisor.check()
    monkeypatch.setattr(CoreManager, "read_vfs", lambda _self: pytest.fail("nothing has changed"))
    manager.supervisor.check()


def test_vfs_are_read_now_and_then_though_nobody_has_told(world: World, manager: SystemManager) -> None:
    """Of a PF that is down the kernel tells nothing."""
    vf = create(manager).vf
    manager.supervisor.links_changed()
    manager.supervisor.check()
    world.host.fake_net.set_vf(vf.interface, vf.index, vlan=7)
    for _ in range(10):
        manager.supervisor.check()
    assert kinds(manager).count("drifted") == 1


def test_links_of_guests_are_watched_whatever_is_configured(manager: SystemManager) -> None:
    interface = create(manager).vf.interface
    assert manager.supervisor.uses(interface)
    assert not manager.supervisor.uses("nic9")
    manager.delete(OPERATOR, "web")
    assert not manager.supervisor.uses(interface)


def test_vfs_that_could_not_be_read_are_read_again(world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch) -> None:
    vf = create(manager).vf

    def fail(_self: object) -> None:
        raise HostError("no netlink")

    world.host.fake_net.set_vf(vf.interface, vf.index, vlan=7)
    with monkeypatch.context() as patch:
        patch.setattr(CoreManager, "read_vfs", fail)
        manager.supervisor.check()
        assert "drifted" not in kinds(manager), "what could not be read has not changed"
    manager.supervisor.check()
    assert "drifted" in kinds(manager)


def test_housekeeping_that_shrinks_frees_no_core_on_which_a_guests_threads_may_run(world: World) -> None:
    """Guests go on while the manager gets its new configuration, with the affinities that they were started with."""
    wide = replace(world.server.policy, housekeeping=CpuSet.parse("0-3"))
    manager, ledger = world.open_manager(wide)
    create(manager, name="stopped")
    manager.kill(OPERATOR, "stopped")
    pid = world.hypervisor.guest(create(manager).name).pid
    assert str(world.hypervisor.guest("web").emulator_pin) == "0-3"
    ledger.close()
    manager, ledger = world.open_manager()
    manager.supervisor.recover()
    assert {str(thread.allowed) for thread in read_process_threads(world.host, pid) if "qemu" in thread.name} == {"0-1"}
    assert str(world.hypervisor.guest("web").emulator_pin) == "0-1"
    assert [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"] == [
        "QEMU's other threads may run on CPUs 0-3 in place of 0-1: pinned again"
    ]
    assert create(manager, name="new").cpus == (2, 3)
    manager.start(OPERATOR, "stopped")
    assert str(world.hypervisor.guest("stopped").emulator_pin) == "0-1"
    assert world.host.violations() == []


def test_housekeeping_that_takes_a_guests_cores_is_refused(world: World, manager: SystemManager, ledger: Ledger) -> None:
    create(manager)
    manager.kill(OPERATOR, "web")
    ledger.close()
    manager, ledger = world.open_manager(replace(world.server.policy, housekeeping=CpuSet.parse("0-3")))
    with pytest.raises(Conflict, match="CPUs 0-3 cannot be for housekeeping: CPUs 2-3 are guest web's"):
        manager.supervisor.recover()


def test_pins_that_something_changes_all_the_time_are_told_of_once(world: World, manager: SystemManager) -> None:
    create(manager)
    world.hypervisor.pin("web", 0, CpuSet.parse("2-3"))
    for _ in range(3):
        manager.supervisor.check()
        assert [str(vcpu.pin) for vcpu in world.hypervisor.guest("web").vcpus] == ["2", "3"]
        world.hypervisor.pin("web", 0, CpuSet.parse("2-3"))
    manager.supervisor.check()
    manager.supervisor.check()  # nothing is wrong any more
    world.hypervisor.pin("web", 0, CpuSet.parse("2-3"))
    manager.supervisor.check()
    told = [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"]
    assert told == ["vCPU 0 may run on CPUs 2-3 in place of 2: pinned again"] * 2


def test_a_creation_that_could_not_be_undone_is_undone_later(
    world: World, manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paused, and whoever asked for it was told that it failed: it must not run one day."""

    def fail(_uuid: object) -> None:
        raise HypervisorError("libvirt is away")

    with monkeypatch.context() as patch:
        patch.setattr(world.hypervisor, "resume", fail)
        patch.setattr(world.hypervisor, "destroy", fail)
        with pytest.raises(HypervisorError):
            create(manager)
    assert world.hypervisor.paused() == {"web"}
    manager.supervisor.collect()
    assert world.hypervisor.names() == set()
    assert ledger.read().claims == ()


def test_a_look_does_not_wait_for_a_guest_that_is_being_stopped(world: World, manager: SystemManager) -> None:
    create(manager)
    create(manager, name="deaf")
    world.hypervisor.deaf.add("deaf")
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    stopping = threading.Thread(target=lambda: manager.stop(OPERATOR, "deaf", 3))
    stopping.start()
    until(lambda: state(manager, "deaf") == "stopping")
    world.hypervisor.end("web")
    for _ in range(2):
        manager.supervisor.collect()
        manager.supervisor.check()
    assert stopping.is_alive()
    assert (state(manager), state(manager, "deaf")) == ("stopped", "stopping")
    stopping.join()
    assert state(manager, "deaf") == "stopped"


def test_a_guest_that_could_not_be_let_run_is_tried_again(
    world: World, manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt was away at the wrong moment of a recovery."""

    def fail(*_: object) -> None:
        raise HypervisorError("libvirt is away")

    resume = world.hypervisor.resume
    monkeypatch.setattr(world.hypervisor, "resume", fail)
    # Killed here, as far as the next manager can see.
    monkeypatch.setattr(manager.supervisor, "delete", fail)
    with pytest.raises(HypervisorError):
        create(manager)
    ledger._db.execute("UPDATE guest SET state = 'creating'")
    ledger.close()
    manager, _ = world.open_manager()
    manager.supervisor.recover()
    assert (state(manager), world.hypervisor.paused()) == ("creating", {"web"})
    monkeypatch.setattr(world.hypervisor, "resume", resume)
    manager.supervisor.collect()
    assert (state(manager), world.hypervisor.paused()) == ("running", set())


def test_a_guest_that_somebody_has_suspended_stays_so(world: World, manager: SystemManager, ledger: Ledger) -> None:
    plan = create(manager)
    world.hypervisor.suspend("web")
    ledger.close()
    manager, _ = world.open_manager()
    manager.supervisor.recover()
    manager.supervisor.collect()
    assert (state(manager), world.hypervisor.paused()) == ("running", {"web"})
    assert [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"] == ["it is suspended"]
    world.hypervisor.resume(plan.uuid)
    manager.supervisor.check()
    assert manager.events(OPERATOR)[-1].detail == "all is as it was"


def test_an_adopted_guest_that_could_not_be_held_is_tried_again(
    world: World, manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, held = create(manager), []

    def hold(_self: object, plan: Plan) -> None:
        held.append(plan)
        if len(held) == 1:
            raise HypervisorError("libvirt is away")

    ledger.close()
    manager, _ = world.open_manager()
    monkeypatch.setattr(CoreManager, "hold", hold)
    manager.supervisor.recover()
    for _ in range(3):
        manager.supervisor.collect()
    assert held == [plan, plan]


def test_a_guest_whose_end_nobody_has_told_is_started(world: World, manager: SystemManager) -> None:
    plan = create(manager)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web")
    assert state(manager) == "ended"
    assert manager.start(OPERATOR, "web").state == "running"
    assert world.hypervisor.guest("web").hostdevs == (plan.vf.address,)
    assert [event.detail for event in manager.events(OPERATOR) if event.kind == "stopped"] == ["it had ended already"]


def test_a_guest_that_somebody_else_has_started_is_not_ended_by_a_start(
    world: World, manager: SystemManager, ledger: Ledger
) -> None:
    create(manager)
    stop_on_paper(ledger)
    with pytest.raises(Conflict, match="somebody else has started it"):
        manager.start(OPERATOR, "web")
    assert (state(manager), world.hypervisor.names()) == ("quarantined", {"web"})


# Ended by somebody


def test_a_kill_does_not_wait_for_a_stop(world: World, manager: SystemManager) -> None:
    """Even if it names the version that it has seen, which the stop changes."""
    create(manager)
    world.hypervisor.deaf.add("web")
    stopping = threading.Thread(target=lambda: manager.stop(OPERATOR, "web", 60))
    stopping.start()
    until(lambda: state(manager) == "stopping")
    time.sleep(0.3)
    began = time.monotonic()
    manager.kill(OPERATOR, "web", manager.guest(OPERATOR, "web").version)
    stopping.join()
    assert time.monotonic() - began < 20
    assert state(manager) == "stopped"
    (said,) = [event.detail for event in manager.events(OPERATOR) if event.kind == "stopped"]
    assert said.startswith("ended, since it had not powered off after ")
    assert float(said.split()[-2]) < 20, "as long as it had, not the 60 s that it was to have"
    manager.start(OPERATOR, "web")
    world.hypervisor.deaf.clear()
    assert manager.stop(OPERATOR, "web", 20).state == "stopped"
    assert manager.events(OPERATOR)[-1].detail == "powered off", "the hurry was for that one stop"


def test_each_guest_has_an_id_of_its_own(manager: SystemManager) -> None:
    """So that what is said of one that is gone is never taken for what is said of the next of its name and place."""
    first = create(manager)
    manager.delete(OPERATOR, "web")
    second = create(manager)
    assert (first.vf, first.cores) == (second.vf, second.cores)
    assert first.uuid != second.uuid


def test_an_image_that_is_gone_is_named(world: World, manager: SystemManager) -> None:
    create(manager)
    manager.stop(OPERATOR, "web", 1)
    (world.folder / "images" / IMAGE).rename(world.folder / "gone")
    with pytest.raises(NotFound, match=f"image.*{IMAGE}"):
        manager.start(OPERATOR, "web")
    assert state(manager) == "stopped"


def test_an_id_stands_for_one_request(manager: SystemManager) -> None:
    """Also if two come at once, under two names: the second is planned after the first was looked for."""
    create(manager, id="job.1")
    with pytest.raises(Conflict, match="stands for another request"):
        manager._placing.claim(OPERATOR, parse_guest_request({"name": "db", "image": IMAGE, "memory": "64M", "id": "job.1"}))


# Quarantine


def test_what_cannot_be_verified_clean_is_nobodys(world: World, manager: SystemManager, ledger: Ledger) -> None:
    plan = create(manager)
    spoil(world, plan)
    with pytest.raises(Conflict, match="web has ended, but is in quarantine.* has no reset of its own"):
        manager.delete(OPERATOR, "web")
    assert world.hypervisor.names() == set()
    assert [one.name for one in manager.quarantined(OPERATOR)] == ["web"]
    assert create(manager, name="other").vf.address != plan.vf.address
    with pytest.raises(Conflict, match="in quarantine"):
        manager.delete(OPERATOR, "web")
    with pytest.raises(Conflict, match="can't become starting"):
        manager.start(OPERATOR, "web")
    with pytest.raises(Conflict, match="still not clean.* no reset"):
        manager.clear_quarantine(OPERATOR, "web")
    assert state(manager) == "quarantined"
    world.host.add(f"{DEVICES}/{plan.vf.address}/reset")
    manager.clear_quarantine(OPERATOR, "web")
    assert ledger.find("web") is None
    assert ledger.pending("web") == ()
    assert create(manager).vf.address == plan.vf.address


def test_an_operator_may_clear_by_force(world: World, manager: SystemManager, ledger: Ledger) -> None:
    plan = create(manager)
    spoil(world, plan)
    assert manager.stop(OPERATOR, "web", 1).state == "quarantined"
    manager.clear_quarantine(OPERATOR, "web", force=True)
    assert ledger.find("web") is None
    assert ledger.pending("web") == ()
    assert world.host.link(f"{DEVICES}/{plan.vf.address}/driver") != VFIO


def test_a_quarantine_outlives_the_manager(world: World, manager: SystemManager, ledger: Ledger) -> None:
    spoil(world, create(manager))
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    manager.stop(OPERATOR, "web", 1)
    before = manager.quarantined(OPERATOR)
    ledger.close()
    manager, _ = world.open_manager()
    manager.supervisor.recover()
    manager.supervisor.collect()
    assert manager.quarantined(OPERATOR) == before


def test_a_stopped_guest_that_somebody_else_starts_is_in_quarantine_and_runs(
    world: World, manager: SystemManager, ledger: Ledger
) -> None:
    create(manager)
    stop_on_paper(ledger)
    manager.supervisor.collect()
    (one,) = manager.quarantined(OPERATOR)
    assert "somebody else has started it" in one.reasons[0]
    assert world.hypervisor.names() == {"web"}
    manager.clear_quarantine(OPERATOR, "web")
    assert world.hypervisor.names() == set(), "an operator's word ends it"
    assert ledger.find("web") is None


def use_pages(world: World, plan: Plan, pid: int, pages: int) -> None:
    """A program that is no guest takes huge pages of the guest's pool."""
    free = f"sys/devices/system/node/node{plan.node}/hugepages/hugepages-2048kB/free_hugepages"
    world.host.add(free, str(int(world.host.read(free)) - pages))
    if pid:
        world.host.add(f"proc/{pid}/status", f"Name:\tdatabase\nHugetlbPages:\t{2048 * pages} kB\n")


def test_a_program_may_use_huge_pages_too(world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's have come back, as far as can be told; without a program that has them, pages are missing."""
    monkeypatch.setattr(pages_module, "_RETURN", 0.3)
    plan = create(manager)
    use_pages(world, plan, 7000, 3)
    assert manager.stop(OPERATOR, "web", 1).state == "stopped"
    manager.start(OPERATOR, "web")
    use_pages(world, plan, 0, 1)
    assert manager.stop(OPERATOR, "web", 1).state == "quarantined"
    assert "1 of its 32 huge pages" in manager.quarantined(OPERATOR)[0].reasons[0]
    use_pages(world, plan, 0, -1)
    manager.clear_quarantine(OPERATOR, "web")
    assert manager.quarantined(OPERATOR) == ()


def test_pages_that_were_missing_before_are_not_the_guests(
    world: World, manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has left files in hugetlbfs: no process has their pages. Another manager knows as much of it."""
    monkeypatch.setattr(pages_module, "_RETURN", 0.3)
    plan = create(manager, name="first")
    manager.delete(OPERATOR, "first")
    use_pages(world, plan, 0, 10)
    plan = create(manager)
    manager.stop(OPERATOR, "web", 1)
    manager.start(OPERATOR, "web")
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    ledger.close()
    manager, _ = world.open_manager()
    manager.supervisor.recover()
    assert manager.stop(OPERATOR, "web", 1).state == "stopped"
    manager.start(OPERATOR, "web")
    use_pages(world, plan, 0, 1)
    assert manager.stop(OPERATOR, "web", 1).state == "quarantined"
    assert "1 of its 32 huge pages" in manager.quarantined(OPERATOR)[0].reasons[0]


def test_after_a_reboot_no_page_is_the_guests(
    world: World, manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing then was taken by whoever was up before the manager."""
    monkeypatch.setattr(pages_module, "_RETURN", 0.3)
    plan = create(manager)
    ledger.close()
    world.reboot()
    use_pages(world, plan, 0, 10)
    manager, _ = world.open_manager()
    manager.supervisor.recover()
    assert state(manager) == "stopped"


# What is logged


ANN = Identity("ann", Role.TENANT, "a")


@pytest.mark.parametrize("kind", ["failed", "plan-failed", "quarantined"])
def test_a_tenant_does_not_learn_of_others_from_trouble(manager: SystemManager, ledger: Ledger, kind: str) -> None:
    ledger.log(kind, "web", "VF is in use by domain secret", tenant="a")
    assert "secret" not in str(manager.events(ANN))
    assert "the operator of the host can see" in manager.events(ANN)[-1].detail
    assert "secret" in manager.events(OPERATOR)[-1].detail


def test_what_the_host_can_not_do_is_no_refusal(world: World, manager: SystemManager, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_own: object) -> None:
        raise HypervisorError("QEMU of guest secret does not answer")

    monkeypatch.setattr(world.hypervisor, "guests", fail)
    with pytest.raises(HypervisorError):
        manager.create(ANN, parse_guest_request({"name": "web", "image": IMAGE, "memory": "64M"}))
    with pytest.raises(NotFound):
        manager.create(ANN, parse_guest_request({"name": "web", "image": "none", "memory": "64M"}))
    assert kinds(manager)[-2:] == ["plan-failed", "refused"]


def test_a_quota_counts_before_there_is_room(manager: SystemManager) -> None:
    """Whoever has used his quota up does not learn how full the host is."""
    limited = replace(ANN, quota=Quota(cores=1))
    fields = {"name": "web", "image": IMAGE, "memory": "64M"}
    with pytest.raises(QuotaExceeded, match="900 cores of 1"):
        manager.plan(limited, parse_guest_request({**fields, "cores": 900}))
    with pytest.raises(NoRoom) as caught:
        manager.plan(ANN, parse_guest_request({**fields, "cores": 900}))
    assert caught.value.hint == "ask the operator of the host"
    with pytest.raises(NoRoom, match="nohype survey"):
        manager.plan(OPERATOR, parse_guest_request({**fields, "cores": 900}))


def test_a_tenant_is_not_told_what_is_not_clean(world: World, manager: SystemManager) -> None:
    spoil(world, manager.create(ANN, parse_guest_request({"name": "web", "image": IMAGE, "memory": "64M"}))[0].plan)
    with pytest.raises(Conflict, match="in quarantine, since not all that it had is clean\n"):
        manager.delete(ANN, "web")


def test_a_change_stands_though_its_event_can_not_be_written(
    manager: SystemManager, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has just become full. The ledger knows what is so; what was done is not undone for want of its story."""

    def fail(*_: object, **__: object) -> None:
        raise LedgerError("database or disk is full")

    monkeypatch.setattr(ledger, "log", fail)
    create(manager)
    assert state(manager) == "running"
    manager.stop(OPERATOR, "web", 1)
    assert state(manager) == "stopped"
    manager.delete(OPERATOR, "web")
    assert ledger.read().claims == ()
    assert manager.survey().pfs[0].vfs == (), "the host was given back"


def test_a_start_says_what_was_changed(manager: SystemManager) -> None:
    plan = create(manager)
    (started,) = [event for event in manager.events(OPERATOR) if event.kind == "started"]
    for said in (
        f"on CPUs {CpuSet.of(plan.cpus)}",
        f"give VF {plan.vf.index} of {plan.vf.interface} the address",
        "create ",
        "threads and interrupts",
    ):
        assert said in started.detail
    assert started.who == OPERATOR.name


def test_refusals_cannot_fill_the_disk(ledger: Ledger) -> None:
    now = [0.0]
    log = RefusalLog(ledger, lambda: now[0])
    before = ledger.last_event()
    for _ in range(MOST * 3):
        log.log("web", NoRoom("no room", ()), OPERATOR, 0.1)
    log.log("web", NoRoom("no room", ()), MANAGER, 0.1)
    events = ledger.events(before)
    assert len(events) == MOST + 2, "one says that there are more, and others are not silenced"
    assert "further ones of this minute are not logged" in events[-2].detail
    now[0] = 61
    log.log("web", NoRoom("no room" * 1000, ()), OPERATOR, 0.1)
    *_, last = ledger.events(before)
    assert len(ledger.events(before)) == MOST + 3
    assert len(last.detail) < 600


def test_the_newest_events_of_a_tenant(ledger: Ledger) -> None:
    for number in range(5):
        ledger.log("told", f"a{number}", "", tenant="a")
        ledger.log("told", f"b{number}", "", tenant="b")
    ledger.log("told", "b", "", tenant="b")
    assert [event.subject for event in ledger.events(None, 2, "a")] == ["a3", "a4"]
    assert [event.subject for event in ledger.events(None, 2)] == ["b4", "b"]


def test_a_recovery_shows_that_it_goes_on(world: World, manager: SystemManager, ledger: Ledger) -> None:
    """systemd is told before each guest, so that a host full of guests is not too slow for it."""
    for name in ("web", "db"):
        create(manager, name=name)
    ledger.close()
    told: list[int] = []
    world.open_manager()[0].supervisor.recover(lambda: told.append(1))
    assert len(told) == 2
