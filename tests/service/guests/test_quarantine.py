"""What could not be verified clean."""

from __future__ import annotations

import threading
import time

import pytest

from orchestrator.errors import Conflict, HostError, HypervisorError, NotFound, OrchestratorError, Stale
from orchestrator.guests.service import GuestService
from orchestrator.host.pci import VFIO
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.resources import memory as pages_module
from orchestrator.resources import nic as vfs_module
from tests.fakes.root import DEVICES
from tests.harness.crash import World
from tests.harness.guests import create, open_manager, spoil, state, stop_on_paper, use_pages


def test_unverified_cleanup_quarantines_resources(world: World, manager: GuestService, ledger: Ledger) -> None:
    plan = create(manager)
    spoil(world, plan)
    with pytest.raises(
        Conflict, match="web was stopped and quarantined: cleanup not verified: .* cannot be reset .no sysfs reset"
    ):
        manager.delete(OPERATOR, "web")
    assert world.hypervisor.running_names() == set()
    assert [one.name for one in manager.quarantined(OPERATOR)] == ["web"]
    assert create(manager, name="other").vf.address != plan.vf.address
    with pytest.raises(Conflict, match="in quarantine"):
        manager.delete(OPERATOR, "web")
    with pytest.raises(Conflict, match="can't become starting"):
        manager.start(OPERATOR, "web")
    with pytest.raises(Conflict, match="web: verification failed: .* cannot be reset"):
        manager.clear_quarantine(OPERATOR, "web")
    assert state(manager) == "quarantined"
    world.host.add(f"{DEVICES}/{plan.vf.address}/reset")
    manager.clear_quarantine(OPERATOR, "web")
    assert ledger.find("web") is None
    assert ledger.undo_records("web") == ()
    assert create(manager).vf.address == plan.vf.address


def test_an_operator_may_clear_by_force(world: World, manager: GuestService, ledger: Ledger) -> None:
    plan = create(manager)
    spoil(world, plan)
    assert manager.stop(OPERATOR, "web", 1).state == "quarantined"
    manager.clear_quarantine(OPERATOR, "web", force=True)
    assert ledger.find("web") is None
    assert ledger.undo_records("web") == ()
    assert world.host.link(f"{DEVICES}/{plan.vf.address}/driver") != VFIO


def test_a_quarantine_outlives_the_manager(world: World, manager: GuestService, ledger: Ledger) -> None:
    spoil(world, create(manager))
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    manager.stop(OPERATOR, "web", 1)
    before = manager.quarantined(OPERATOR)
    ledger.close()
    manager, _ = world.open_manager()
    manager.reconciler.recover()
    manager.reconciler.reconcile()
    assert manager.quarantined(OPERATOR) == before


def test_stopped_guest_started_outside_the_manager_is_quarantined_and_keeps_running(
    world: World, manager: GuestService, ledger: Ledger
) -> None:
    create(manager)
    stop_on_paper(ledger)
    manager.reconciler.reconcile()
    (one,) = manager.quarantined(OPERATOR)
    assert "started outside the manager" in one.reasons[0]
    assert world.hypervisor.running_names() == {"web"}
    manager.clear_quarantine(OPERATOR, "web")
    assert world.hypervisor.running_names() == set(), "an operator's word ends it"
    assert ledger.find("web") is None


def test_a_program_may_use_huge_pages_too(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that a program has do not count as unreturned; pages that no program has do."""
    monkeypatch.setattr(pages_module, "RETURN_SECONDS", 0.3)
    plan = create(manager)
    use_pages(world, plan, 7000, 3)
    assert manager.stop(OPERATOR, "web", 1).state == "stopped"
    manager.start(OPERATOR, "web")
    use_pages(world, plan, 0, 1)
    assert manager.stop(OPERATOR, "web", 1).state == "quarantined"
    assert "1 of 32 huge pages" in manager.quarantined(OPERATOR)[0].reasons[0]
    use_pages(world, plan, 0, -1)
    manager.clear_quarantine(OPERATOR, "web")
    assert manager.quarantined(OPERATOR) == ()


def test_pages_that_were_missing_before_are_not_the_guests(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has left files in hugetlbfs: no process has their pages. Another manager knows as much of it."""
    monkeypatch.setattr(pages_module, "RETURN_SECONDS", 0.3)
    plan = create(manager, name="first")
    manager.delete(OPERATOR, "first")
    use_pages(world, plan, 0, 10)
    plan = create(manager)
    manager.stop(OPERATOR, "web", 1)
    manager.start(OPERATOR, "web")
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    ledger.close()
    manager, _ = world.open_manager()
    manager.reconciler.recover()
    assert manager.stop(OPERATOR, "web", 1).state == "stopped"
    manager.start(OPERATOR, "web")
    use_pages(world, plan, 0, 1)
    assert manager.stop(OPERATOR, "web", 1).state == "quarantined"
    assert "1 of 32 huge pages" in manager.quarantined(OPERATOR)[0].reasons[0]


def test_after_a_reboot_no_page_is_the_guests(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing pages were taken by a program that was started before the manager."""
    monkeypatch.setattr(pages_module, "RETURN_SECONDS", 0.3)
    plan = create(manager)
    ledger.close()
    world.reboot()
    use_pages(world, plan, 0, 10)
    manager, _ = world.open_manager()
    manager.reconciler.recover()
    assert state(manager) == "stopped"


def test_a_clearing_that_fails_leaves_it_in_quarantine(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt can't end it: it must not count as a guest that runs as it should."""
    create(manager)
    stop_on_paper(ledger)
    manager.reconciler.reconcile()

    def fail(_uuid: object) -> None:
        raise HypervisorError("Failed to terminate process: Device or resource busy")

    monkeypatch.setattr(world.hypervisor, "destroy", fail)
    for force in (False, True):
        with pytest.raises(HypervisorError):
            manager.clear_quarantine(OPERATOR, "web", force=force)
        manager.reconciler.reconcile()
        assert [one.name for one in manager.quarantined(OPERATOR)] == ["web"]


def test_unreturned_pages_are_detected_with_another_guest_in_quarantine(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are long back: they must not count for those that another guest has not given back."""
    monkeypatch.setattr(pages_module, "RETURN_SECONDS", 0.3)
    spoil(world, create(manager, name="dirty"))
    assert manager.stop(OPERATOR, "dirty", 0).state == "quarantined"
    plan = create(manager)
    monkeypatch.setattr(world.hypervisor, "take_pages", lambda _guest, _count: None)
    assert manager.stop(OPERATOR, "web", 0).state == "quarantined"
    assert f"{plan.pages} of {plan.pages} huge pages" in manager.quarantined(OPERATOR)[1].reasons[0]


def open_counting(world: World) -> tuple[GuestService, list[int]]:
    """A manager, and a list that grows with each cleanup that is not verified."""
    counted: list[int] = []
    manager = GuestService(
        world.host, world.hypervisor, Ledger(world.folder / "ledger.sqlite"), world.server.policy,  # type: ignore[arg-type]
        images=world.folder / "images", consoles=world.folder / "consoles", count_undo_failure=lambda: counted.append(1),
    )  # fmt: skip
    return manager, counted


def test_failed_event_precedes_the_cleanup(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, counted = open_counting(world)

    def fail(_xml: str) -> None:
        for file in (world.host.path / DEVICES).glob("*/reset"):
            file.unlink()
        raise HypervisorError("QEMU refused")

    monkeypatch.setattr(world.hypervisor, "create_paused", fail)
    with pytest.raises(HypervisorError, match="QEMU refused"):
        create(manager)
    *_, failed, quarantined = manager.events(OPERATOR)
    assert (failed.kind, failed.detail, quarantined.kind) == ("failed", "QEMU refused", "quarantined")
    assert failed.took is not None
    assert counted == [1]


def test_failed_release_of_the_host_is_reported_once_and_repeated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, counted = open_counting(world)

    def fail(_host: object, _pf: object, _count: object) -> None:
        raise HostError("cannot write 0 to sriov_numvfs: device busy")

    with monkeypatch.context() as patch:
        create(manager)
        patch.setattr(vfs_module, "set_numvfs", fail)
        manager.delete(OPERATOR, "web")
        manager.reconciler.reconcile()
    told = [event for event in manager.events(OPERATOR) if event.kind == "undo-failed"]
    assert [event.subject for event in told] == ["host"]
    assert "device busy" in told[0].detail
    assert counted == [1]
    assert world.count_undo_records()
    manager.reconciler.reconcile()
    assert not world.count_undo_records()


def test_clearing_does_not_affect_a_later_guest_of_the_same_name(world: World, manager: GuestService) -> None:
    """An operator clears by force what he has looked at. While he waits for the lock it is cleared, and the name is used anew."""
    spoil(world, create(manager))
    manager.stop(OPERATOR, "web", 1)
    told: list[OrchestratorError] = []

    def clear() -> None:
        with pytest.raises(NotFound) as caught:
            manager.clear_quarantine(OPERATOR, "web", force=True)
        told.append(caught.value)

    thread = threading.Thread(target=clear)
    with manager.transitions.guest_locks("web"):
        thread.start()
        time.sleep(0.3)
        manager.clear_quarantine(OPERATOR, "web", force=True)
        spoil(world, create(manager))
        manager.stop(OPERATOR, "web", 1)
    thread.join(10)
    assert [error.message for error in told] == ["guest web ended or was replaced during the request"]
    assert state(manager) == "quarantined"


def test_clearing_another_version_is_refused(world: World, manager: GuestService) -> None:
    spoil(world, create(manager))
    version = manager.stop(OPERATOR, "web", 1).version
    with pytest.raises(Stale):
        manager.clear_quarantine(OPERATOR, "web", version - 1, force=True)
    assert state(manager) == "quarantined"
    manager.clear_quarantine(OPERATOR, "web", version, force=True)
    assert manager.guests(OPERATOR) == ()


def test_undo_record_of_another_version_stops_neither_start_nor_other_guests(
    world: World, manager: GuestService, ledger: Ledger
) -> None:
    create(manager)
    create(manager, name="other")
    for owner in ("web", "host"):
        ledger.add_undo_record(owner, "teleport", {"to": "mars"})
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    again = open_manager(world)
    assert (state(again), state(again, "other")) == ("running", "running")
    again.delete(OPERATOR, "other")
    with pytest.raises(Conflict, match="unknown undo action teleport of guest web: written by another version"):
        again.delete(OPERATOR, "web")
    again = open_manager(world)
    assert (state(again), [record.action for record in ledger.undo_records("web")]) == ("quarantined", ["teleport"])
    again.clear_quarantine(OPERATOR, "web", force=True)
    assert any("unknown undo action teleport of the host" in event.detail for event in again.events(OPERATOR))
    assert [record.action for record in ledger.undo_records("host")] == ["teleport"], "all else of the host is undone"
    create(open_manager(world), name="next")
