"""What the manager notices now and then, and what a start of it puts in order."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from dataclasses import replace
from uuid import UUID

import pytest

from orchestrator.errors import Conflict, HostError, HypervisorError
from orchestrator.guests import restarts as restarts_module
from orchestrator.guests.core_manager import CoreManager
from orchestrator.guests.host_setup import HostSetup
from orchestrator.guests.service import GuestService
from orchestrator.host.processes import read_process_threads
from orchestrator.hypervisor.connection import EndCause, RunningGuest
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.state import GuestState
from orchestrator.model.topology import VfState
from orchestrator.values import CpuSet, PciAddress
from tests.harness.crash import World
from tests.harness.guests import create, kinds, start_by_hand, state, stop_on_paper, until, waiting


def test_missed_end_event_is_reconciled(world: World, manager: GuestService) -> None:
    create(manager)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web")
    manager.reconciler.reconcile()
    assert state(manager) == "ended", "it may be about to be told"
    manager.reconciler.reconcile()
    assert state(manager) == "stopped"


def test_late_end_event_decides_the_cause(world: World, manager: GuestService, ledger: Ledger) -> None:
    """A look in between must not take a power-off for a failure."""
    plan = create(manager, restart="on-failure")
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web", EndCause.POWERED_OFF)
    manager.reconciler.reconcile()
    manager.reconciler.on_guest_ended(plan.uuid, EndCause.POWERED_OFF)
    claim = ledger.find("web")
    assert claim
    assert (claim.state, claim.restarts) == (GuestState.STOPPED, 0)


def test_stop_cancels_a_scheduled_restart_for_later_managers_too(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for the next manager, and for a timer that waits for its turn."""
    monkeypatch.setattr(restarts_module, "delay", lambda _restarts: 60)
    create(manager, restart="on-failure")
    world.hypervisor.end("web", EndCause.FAILED)
    until(lambda: state(manager) == "stopped")
    waits = waiting(manager)
    manager.stop(OPERATOR, "web", 1)
    assert manager.events(OPERATOR)[-1].detail == "had already ended; scheduled restart cancelled"
    waits.function()
    ledger.close()
    manager, ledger = world.open_manager()
    monkeypatch.setattr(restarts_module, "delay", lambda _restarts: 0.01)
    manager.reconciler.recover()
    time.sleep(0.2)
    assert state(manager) == "stopped"


def test_drift_check_skips_a_guest_that_was_replaced(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it looks, the guest that it has read of is deleted, and another gets the name, and other cores."""
    create(manager)
    old = ledger.read()
    manager.delete(OPERATOR, "web")
    create(manager, name="other")
    plan = create(manager)
    assert plan.cpus != old.claims[0].plan.cpus
    monkeypatch.setattr(ledger, "read", lambda: old)
    manager.reconciler.detect_drift()
    assert [str(vcpu.pin) for vcpu in world.hypervisor.read_guest("web").vcpus] == [str(cpu) for cpu in plan.cpus]
    assert "drifted" not in kinds(manager)


def test_changed_vf_is_reported_once_and_not_restored(world: World, manager: GuestService) -> None:
    """Some drivers reset a VF for it: that could hurt the guest."""
    vf = create(manager).vf
    net = world.host.fake_net

    def told() -> list[str]:
        manager.reconciler.on_link_change()
        manager.reconciler.detect_drift()
        return [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"]

    assert told() == []
    net.set_vf(vf.interface, vf.index, vlan=7, spoof_check=False)
    assert told() == told() == [f"VF {vf.address}: vlan is 7, expected 0; VF {vf.address}: spoof check is off, expected on"]
    assert net.vfs(vf.interface)[vf.index].vlan == 7
    net.enforce_vf(vf.interface, VfState(vf.index, vf.mac))
    assert told()[1:] == ["no differences remain"]


def test_vf_of_a_guest_restarted_during_the_round_has_no_drift(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VFs are read once per round; a stop and a start in between are not drift."""
    create(manager)
    now, first = HostSetup.read_vf_states, [dict[PciAddress, tuple[VfState, ...]]()]
    monkeypatch.setattr(HostSetup, "read_vf_states", lambda self: first.pop() if first else now(self))
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()
    assert first == []
    assert "drifted" not in kinds(manager)


def test_vfs_are_read_only_when_a_link_has_changed(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    create(manager)
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()
    monkeypatch.setattr(HostSetup, "read_vf_states", lambda _self: pytest.fail("nothing has changed"))
    manager.reconciler.detect_drift()


def test_vfs_are_read_every_tenth_round_without_a_link_change(world: World, manager: GuestService) -> None:
    """Of a PF that is down the kernel tells nothing."""
    vf = create(manager).vf
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()
    world.host.fake_net.set_vf(vf.interface, vf.index, vlan=7)
    for _ in range(10):
        manager.reconciler.detect_drift()
    assert kinds(manager).count("drifted") == 1


def test_links_of_guests_are_watched_if_not_configured_as_uplinks(manager: GuestService) -> None:
    interface = create(manager).vf.interface
    assert manager.reconciler.has_guest_on(interface)
    assert not manager.reconciler.has_guest_on("nic9")
    manager.delete(OPERATOR, "web")
    assert not manager.reconciler.has_guest_on(interface)


def test_vfs_that_could_not_be_read_are_read_again(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    vf = create(manager).vf

    def fail(_self: object) -> None:
        raise HostError("no netlink")

    world.host.fake_net.set_vf(vf.interface, vf.index, vlan=7)
    with monkeypatch.context() as patch:
        patch.setattr(HostSetup, "read_vf_states", fail)
        manager.reconciler.detect_drift()
        assert "drifted" not in kinds(manager), "what could not be read has not changed"
    manager.reconciler.detect_drift()
    assert "drifted" in kinds(manager)


def test_smaller_housekeeping_confines_running_guests_to_it(world: World) -> None:
    """Guests go on while the manager gets its new configuration, with the affinities that they were started with."""
    wide = replace(world.server.policy, housekeeping=CpuSet.parse("0-3"))
    manager, ledger = world.open_manager(wide)
    create(manager, name="stopped")
    manager.kill(OPERATOR, "stopped")
    pid = world.hypervisor.read_guest(create(manager).name).pid
    assert str(world.hypervisor.read_guest("web").emulator_pin) == "0-3"
    ledger.close()
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    assert {str(thread.allowed) for thread in read_process_threads(world.host, pid) if "qemu" in thread.name} == {"0-1"}
    assert str(world.hypervisor.read_guest("web").emulator_pin) == "0-1"
    assert [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"] == [
        "emulator threads: affinity 0-3, expected 0-1 (restored)"
    ]
    assert create(manager, name="new").cpus == (2, 3)
    manager.start(OPERATOR, "stopped")
    assert str(world.hypervisor.read_guest("stopped").emulator_pin) == "0-1"
    assert world.host.violations() == []


def test_housekeeping_that_takes_a_guests_cores_is_refused(world: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager)
    manager.kill(OPERATOR, "web")
    ledger.close()
    manager, ledger = world.open_manager(replace(world.server.policy, housekeeping=CpuSet.parse("0-3")))
    with pytest.raises(Conflict, match="CPUs 0-3 cannot be housekeeping: CPUs 2-3 are owned by guest web"):
        manager.reconciler.recover()


def test_pinning_changed_again_and_again_is_reported_once(world: World, manager: GuestService) -> None:
    plan = create(manager)
    world.hypervisor.pin(plan.uuid, 0, CpuSet.parse("2-3"))
    for _ in range(3):
        manager.reconciler.detect_drift()
        assert [str(vcpu.pin) for vcpu in world.hypervisor.read_guest("web").vcpus] == ["2", "3"]
        world.hypervisor.pin(plan.uuid, 0, CpuSet.parse("2-3"))
    manager.reconciler.detect_drift()
    manager.reconciler.detect_drift()  # nothing is wrong any more
    world.hypervisor.pin(plan.uuid, 0, CpuSet.parse("2-3"))
    manager.reconciler.detect_drift()
    told = [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"]
    assert told == ["vCPU 0: affinity 2-3, expected 2 (restored)"] * 2


def test_a_creation_that_could_not_be_undone_is_undone_later(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paused, and its caller has the error: it must not run later."""

    def fail(_uuid: object) -> None:
        raise HypervisorError("libvirt is away")

    with monkeypatch.context() as patch:
        patch.setattr(world.hypervisor, "resume", fail)
        patch.setattr(world.hypervisor, "destroy", fail)
        with pytest.raises(HypervisorError):
            create(manager)
    assert world.hypervisor.paused() == {"web"}
    manager.reconciler.reconcile()
    assert world.hypervisor.running_names() == set()
    assert ledger.read().claims == ()


def test_reconciliation_skips_a_guest_that_is_being_stopped(world: World, manager: GuestService) -> None:
    create(manager)
    create(manager, name="deaf")
    world.hypervisor.deaf.add("deaf")
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    stopping = threading.Thread(target=lambda: manager.stop(OPERATOR, "deaf", 3))
    stopping.start()
    until(lambda: state(manager, "deaf") == "stopping")
    world.hypervisor.end("web")
    for _ in range(2):
        manager.reconciler.reconcile()
        manager.reconciler.detect_drift()
    assert stopping.is_alive()
    assert (state(manager), state(manager, "deaf")) == ("stopped", "stopping")
    stopping.join()
    assert state(manager, "deaf") == "stopped"


def test_failed_resume_is_repeated_by_reconciliation(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt was away at the wrong moment of a recovery."""

    def fail(*_: object) -> None:
        raise HypervisorError("libvirt is away")

    resume = world.hypervisor.resume
    monkeypatch.setattr(world.hypervisor, "resume", fail)
    # Killed here, as far as the next manager can see.
    monkeypatch.setattr(manager.transitions, "delete", fail)
    with pytest.raises(HypervisorError):
        create(manager)
    ledger.close()
    with sqlite3.connect(world.folder / "ledger.sqlite") as database:
        database.execute("UPDATE guest SET state = 'creating'")
    database.close()
    manager, _ = world.open_manager()
    manager.reconciler.recover()
    assert (state(manager), world.hypervisor.paused()) == ("creating", {"web"})
    monkeypatch.setattr(world.hypervisor, "resume", resume)
    manager.reconciler.reconcile()
    assert (state(manager), world.hypervisor.paused()) == ("running", set())


def test_suspended_guest_stays_suspended(world: World, manager: GuestService, ledger: Ledger) -> None:
    plan = create(manager)
    world.hypervisor.suspend("web")
    ledger.close()
    manager, _ = world.open_manager()
    manager.reconciler.recover()
    manager.reconciler.reconcile()
    assert (state(manager), world.hypervisor.paused()) == ("running", {"web"})
    assert [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"] == ["suspended"]
    world.hypervisor.resume(plan.uuid)
    manager.reconciler.detect_drift()
    assert manager.events(OPERATOR)[-1].detail == "no differences remain"


def test_failed_confinement_of_an_adopted_guest_is_repeated(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, confined, real = create(manager), [], CoreManager.confine

    def confine(core: CoreManager) -> RunningGuest:
        confined.append(core.plan)
        if len(confined) == 1:
            raise HypervisorError("libvirt is away")
        return real(core)

    ledger.close()
    manager, _ = world.open_manager()
    monkeypatch.setattr(CoreManager, "confine", confine)
    manager.reconciler.recover()
    for _ in range(3):
        manager.reconciler.reconcile()
    assert confined == [plan, plan]


def test_guest_with_a_missed_end_event_is_started(world: World, manager: GuestService) -> None:
    plan = create(manager)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web")
    assert state(manager) == "ended"
    assert manager.start(OPERATOR, "web").state == "running"
    assert world.hypervisor.read_guest("web").hostdevs == (plan.vf.address,)
    assert [event.detail for event in manager.events(OPERATOR) if event.kind == "stopped"] == ["had ended already"]


def test_start_does_not_end_a_guest_started_outside_the_manager(world: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager)
    stop_on_paper(ledger)
    with pytest.raises(Conflict, match="was started outside the manager"):
        manager.start(OPERATOR, "web")
    assert (state(manager), world.hypervisor.running_names()) == ("quarantined", {"web"})


def test_unmanaged_domain_of_same_name_is_not_changed(world: World, manager: GuestService) -> None:
    """The managed guest has ended, and its end is not reported yet."""
    plan = create(manager)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web", EndCause.FAILED)
    start_by_hand(world, plan, uuid=UUID(int=1), cpus="0-7")
    before = world.hypervisor.read_guest("web")
    manager.reconciler.detect_drift()
    manager.reconciler.reconcile()
    assert world.hypervisor.read_guest("web") == before


def test_old_consoles_of_deleted_guests_are_removed(world: World, manager: GuestService) -> None:
    plan = create(manager)
    folder, gone, failed = world.folder / "consoles", "gone.00000000-0000-0000-0000-000000000001.log", "failed.log"
    ours = f"web.{plan.uuid}.log"
    for name, age in (
        (ours, 30),
        (f"{ours}.0", 30),
        (gone, 30),
        (f"{gone}.0", 30),
        (failed, 1),
        ("web.log", 30),
        ("web.log.0", 30),
    ):
        (folder / name).touch()
        os.utime(folder / name, (0, time.time() - age * 24 * 3600))
    manager.remove_old_logs()
    assert sorted(file.name for file in folder.iterdir()) == [failed, ours, f"{ours}.0"]
