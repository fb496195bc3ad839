"""What happens to a guest that ends, by itself or on request."""

from __future__ import annotations

import threading
import time

import pytest

from orchestrator.errors import Conflict, GuestError, NotFound, Stale
from orchestrator.guests import restarts as restarts_module
from orchestrator.guests.service import GuestService
from orchestrator.hypervisor.connection import EndCause
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.request import parse_guest_request
from orchestrator.model.state import GuestState
from tests.fakes.server import IMAGE
from tests.harness.crash import World
from tests.harness.guests import create, kinds, start_by_hand, state, until, waiting


def test_a_guest_that_fails_is_started_again(world: World, manager: GuestService) -> None:
    create(manager, restart="on-failure")
    world.hypervisor.end("web", EndCause.FAILED)
    until(lambda: kinds(manager)[-2:] == ["ended", "started"])
    assert state(manager) == "running"


def test_a_guest_that_has_failed_and_then_powers_off_stays_off(world: World, manager: GuestService, ledger: Ledger) -> None:
    """Its count of restarts says that it is to be started again; a power-off takes that back."""
    create(manager, restart="on-failure")
    world.hypervisor.end("web", EndCause.FAILED)
    until(lambda: kinds(manager).count("started") == 2)
    world.hypervisor.end("web", EndCause.POWERED_OFF)
    until(lambda: kinds(manager)[-1] == "ended")
    claim = ledger.find("web")
    assert claim
    assert (claim.state, claim.restarts) == (GuestState.STOPPED, 0)


def test_a_guest_that_powers_off_and_is_to_be_removed_is_gone(world: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager, remove=True)
    world.hypervisor.end("web", EndCause.POWERED_OFF)
    until(lambda: not ledger.read().claims)


@pytest.mark.parametrize(("remove", "restart"), [(False, "on-failure"), (True, "never")])
def test_interrupted_stop_is_completed_as_a_stop(
    world: World, manager: GuestService, ledger: Ledger, remove: bool, restart: str
) -> None:
    """The manager was killed after the guest had powered off and before it was cleaned up after it."""
    plan = create(manager, remove=remove, restart=restart)
    ledger.set_state("web", GuestState.STOPPING, restarts=0)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web", EndCause.POWERED_OFF)
    ledger.close()
    manager, ledger = world.open_manager()
    manager.reconciler.recover()
    time.sleep(0.1)
    assert state(manager) == "stopped"
    assert manager.start(OPERATOR, "web").plan == plan


def test_interrupted_cleanup_of_a_failure_is_followed_by_the_restart(world: World, manager: GuestService, ledger: Ledger) -> None:
    """It was noted that the guest is to be started again, and the manager was killed while it cleaned up."""
    create(manager, restart="on-failure")
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web", EndCause.FAILED)
    ledger.set_state("web", GuestState.STOPPING, restarts=1)
    ledger.close()
    manager, _ = world.open_manager()
    manager.reconciler.recover()
    until(lambda: state(manager) == "running")


def test_a_guest_that_always_fails_is_given_up(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts_module, "delay", lambda restarts: None if restarts >= 2 else 0.01)
    create(manager, restart="on-failure")
    for number in (2, 3):
        world.hypervisor.end("web", EndCause.FAILED)
        until(lambda: kinds(manager).count("started") == number)  # noqa: B023
    world.hypervisor.end("web", EndCause.FAILED)
    until(lambda: kinds(manager)[-1] == "gave-up")
    assert state(manager) == "stopped"
    assert manager.guest(OPERATOR, "web").restarts == 2
    manager.close()
    ledger.close()
    manager, _ = world.open_manager()
    manager.reconciler.recover()
    assert kinds(manager).count("gave-up") == 1, "it is said once"
    assert manager.transitions.restarts.pending("web") is None


def test_a_kill_does_not_wait_for_a_stop(world: World, manager: GuestService) -> None:
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
    assert said.startswith("forced off after ")
    assert float(said.split()[3]) < 20, "as long as it had, not the 60 s that it was to have"
    manager.start(OPERATOR, "web")
    world.hypervisor.deaf.clear()
    assert manager.stop(OPERATOR, "web", 20).state == "stopped"
    assert manager.events(OPERATOR)[-1].detail == "powered off", "the hurry was for that one stop"


def test_each_guest_has_an_id_of_its_own(manager: GuestService) -> None:
    """So that what is said of one that is gone is never taken for what is said of the next of its name and place."""
    first = create(manager)
    manager.delete(OPERATOR, "web")
    second = create(manager)
    assert (first.vf, first.cores) == (second.vf, second.cores)
    assert first.uuid != second.uuid


def test_an_image_that_is_gone_is_named(world: World, manager: GuestService) -> None:
    create(manager)
    manager.stop(OPERATOR, "web", 1)
    (world.folder / "images" / IMAGE).rename(world.folder / "gone")
    with pytest.raises(NotFound, match=f"image.*{IMAGE}"):
        manager.start(OPERATOR, "web")
    assert state(manager) == "stopped"


def test_an_id_stands_for_one_request(manager: GuestService) -> None:
    """Also if two come at once, under two names: the second is planned after the first was looked for."""
    create(manager, id="job.1")
    with pytest.raises(Conflict, match="was already used for guest"):
        manager.allocator.claim(OPERATOR, parse_guest_request({"name": "db", "image": IMAGE, "memory": "64M", "id": "job.1"}))


def test_a_request_that_is_repeated_does_not_wait_for_a_stop(world: World, manager: GuestService) -> None:
    """That may take an hour. The answer is the guest, in whatever state it is."""
    create(manager, id="job.1")
    world.hypervisor.deaf.add("web")
    stop = threading.Thread(target=manager.stop, args=(OPERATOR, "web", 30))
    stop.start()
    until(lambda: state(manager) == "stopping")
    request = parse_guest_request({"name": "web", "image": IMAGE, "memory": "64M", "id": "job.1"})
    began = time.monotonic()
    view, new = manager.create(OPERATOR, request)
    took = time.monotonic() - began
    manager.kill(OPERATOR, "web")
    stop.join(10)
    assert (view.state, new) == ("stopping", False)
    assert took < 5


def test_restart_does_not_end_a_guest_started_outside_the_manager(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts_module, "delay", lambda _restarts: 60)
    plan = create(manager, restart="on-failure")
    world.hypervisor.end("web", EndCause.FAILED)
    until(lambda: state(manager) == "stopped")
    assert manager.guest(OPERATOR, "web").restarts == 0, "it waits for the first"
    start_by_hand(world, plan)
    before = world.hypervisor.read_guest("web")
    waiting(manager).function()
    assert world.hypervisor.read_guest("web") == before
    assert "started outside the manager" in manager.quarantined(OPERATOR)[0].reasons[0]


def test_replaced_restart_timer_starts_nothing(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody starts the guest while it waits, and it fails again."""
    monkeypatch.setattr(restarts_module, "delay", lambda _restarts: 60)
    create(manager, restart="on-failure")
    world.hypervisor.end("web", EndCause.FAILED)
    until(lambda: manager.transitions.restarts.pending("web"))
    first = waiting(manager)
    manager.start(OPERATOR, "web")
    assert manager.transitions.restarts.pending("web") is None
    world.hypervisor.end("web", EndCause.FAILED)
    until(lambda: manager.transitions.restarts.pending("web"))
    first.function()
    assert state(manager) == "stopped"
    assert waiting(manager) is not first


def test_scheduled_restart_ends_with_its_guest(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest goes into quarantine while it waits, and an operator clears it by force."""
    monkeypatch.setattr(restarts_module, "delay", lambda _restarts: 60)
    plan = create(manager, restart="on-failure")
    world.hypervisor.end("web", EndCause.FAILED)
    until(lambda: manager.transitions.restarts.pending("web"))
    with manager.transitions.guest_locks("web"):  # the end is handled to its end: a busy guest is not reconciled
        start_by_hand(world, plan)
    manager.reconciler.reconcile()
    assert state(manager) == "quarantined"
    manager.clear_quarantine(OPERATOR, "web", force=True)
    assert manager.transitions.restarts.pending("web") is None


@pytest.mark.parametrize("moment", ["read_guest", "read_exits"])
def test_end_during_launch_is_reported_as_such(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before it is confined, or after its first exit: what the kernel says of its files then is no trouble of the host."""
    look = getattr(world.hypervisor, moment)

    def look_and_end(which: object) -> object:
        found = look(which)
        world.hypervisor.end("web", EndCause.RESET)
        return found

    monkeypatch.setattr(world.hypervisor, moment, look_and_end)
    with pytest.raises(GuestError, match="web ended immediately after launch"):
        create(manager)


def test_stale_version_is_refused_immediately(world: World, manager: GuestService) -> None:
    """During a shutdown in another thread, which can take an hour. So is a name that is taken."""
    create(manager)
    seen = manager.guest(OPERATOR, "web").version
    world.hypervisor.deaf.add("web")
    stopping = threading.Thread(target=lambda: manager.stop(OPERATOR, "web", 30))
    stopping.start()
    until(lambda: state(manager) == "stopping")
    began = time.monotonic()
    with pytest.raises(Stale):
        manager.kill(OPERATOR, "web", seen)
    with pytest.raises(Conflict, match="the name web is taken"):
        create(manager)
    assert time.monotonic() - began < 10
    manager.kill(OPERATOR, "web")
    stopping.join()


def test_plan_with_a_known_request_id_shows_the_guest(manager: GuestService) -> None:
    """As `create` does, by the caller's own id."""
    plan = create(manager, id="job.1")
    shown = manager.plan(OPERATOR, parse_guest_request({"name": "web", "image": IMAGE, "memory": "64M", "id": "job.1"}))
    assert (shown.plan, shown.state) == (plan, "running")
