"""Guests that exceed their exit policy are reported, paused or killed."""

from __future__ import annotations

import errno
import itertools
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import HypervisorError, NotFound, RequestError
from orchestrator.guests.service import GuestService
from orchestrator.images.description import write_description
from orchestrator.images.store import read_image
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.exit_policy import ExitBudgets, ExitPolicies
from tests.fakes import tracing
from tests.fakes.server import IMAGE
from tests.harness.crash import World
from tests.harness.guests import create, open_manager, state, until, warned

IO, CPUID, HLT = 0x7B, 0x72, 0x78
EVENT = f"{tracing.INSTANCES}/nohype/{tracing.EXIT}"


@pytest.fixture(autouse=True)
def image_without_default(world: World) -> None:
    """Guests of the image do not make the call, so it has no policy of its own."""
    image = read_image(world.folder / "images" / IMAGE)
    write_description(image.folder, image.model_copy(update={"disengages": False}))


def limits(action: str, **rules: dict[str, int]) -> dict[str, Any]:
    return {"action": action, "housekeeping": rules}


@pytest.fixture(autouse=True)
def amd(world: World) -> None:
    world.host.add("sys/module/kvm_amd/parameters/avic", "N")


def start(manager: GuestService, name: str = "web", **fields: object) -> None:
    create(manager, name=name, **fields)
    manager.disengagements.request(OPERATOR, name)


def show(world: World, dropped: int = 0, **counts: dict[int, int]) -> None:
    """Exits of the first vCPU by guest and reason."""
    tids = {name: world.hypervisor.read_guest(name).vcpus[0].tid for name in counts}
    found = {(tids[name], reason): count for name, reasons in counts.items() for reason, count in reasons.items()}
    tracing.show_hist(world.host, EVENT, found, dropped)


def reports(manager: GuestService) -> list[tuple[str, str]]:
    return [(event.subject, event.detail) for event in manager.events(OPERATOR) if event.kind == EventKind.EXIT_POLICY]


def test_flood_is_killed_and_the_neighbour_stays(world: World, manager: GuestService) -> None:
    start(manager, exit_policy=limits("kill", io={"second": 100}), restart="on-failure")
    start(manager, name="other", exit_policy=limits("kill", io={"second": 100}))
    assert manager.exit_policies.check() == 1
    show(world, web={IO: 900_000}, other={IO: 40})
    manager.exit_policies.check()
    until(lambda: state(manager) == "stopped")
    assert state(manager, "other") == "running"
    ((subject, detail),) = reports(manager)
    assert subject == "web"
    assert detail.startswith("vCPU 0 (housekeeping): 900000 exits of io in ")
    assert detail.endswith("allowed 100 per second; killed")
    assert manager.transitions.restarts.pending("web") is None


def test_guest_is_paused(world: World, manager: GuestService) -> None:
    start(manager, exit_policy=limits("pause", io={"second": 0}))
    manager.exit_policies.check()
    show(world, web={IO: 1})
    manager.exit_policies.check()
    until(lambda: world.hypervisor.paused() == {"web"})
    until(lambda: reports(manager))
    assert reports(manager)[0][1].endswith("; paused")
    assert state(manager) == "running"


@pytest.mark.parametrize("action", ["pause", "kill"])
def test_guest_that_could_not_be_stopped_is_stopped_later(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    start(manager, exit_policy=limits(action, io={"second": 0}))
    manager.exit_policies.check()

    def fail(*_: object, **__: object) -> None:
        raise HypervisorError("cannot pause the guest: timed out")

    with monkeypatch.context() as patch:
        patch.setattr(world.hypervisor, "pause", fail)
        patch.setattr(ledger, "set_state", fail)
        for count in (1, 2):
            show(world, web={IO: count})
            manager.exit_policies.check()
            until(lambda: not any(thread.name == "exit-policy" for thread in threading.enumerate()))
    assert sum("not " in detail and "timed out" in detail for _, detail in reports(manager)) == 1
    assert (state(manager), world.hypervisor.paused()) == ("running", frozenset())
    show(world, web={IO: 3})
    manager.exit_policies.check()
    until(lambda: state(manager) == "stopped" or world.hypervisor.paused() == {"web"})


def test_each_budget_is_reported_once_per_run(world: World, manager: GuestService) -> None:
    start(manager, exit_policy=limits("report", io={"second": 0}, cpuid={"second": 0}))
    manager.exit_policies.check()
    for count in (5, 10, 15):
        show(world, web={IO: count})
        manager.exit_policies.check()
    assert len(reports(manager)) == 1
    show(world, web={IO: 15, CPUID: 3})
    manager.exit_policies.check()
    assert ["cpuid" in detail for _, detail in reports(manager)] == [False, True]
    assert state(manager) == "running"


def test_boot_is_not_judged(world: World, manager: GuestService) -> None:
    create(manager, exit_policy=limits("kill", io={"second": 0}))
    assert manager.exit_policies.check() is None
    show(world, web={IO: 10_000})
    assert manager.exit_policies.check() is None
    manager.disengagements.request(OPERATOR, "web")
    for _ in range(2):
        assert manager.exit_policies.check() == 1
    assert reports(manager) == []


def test_next_run_is_a_boot_again(world: World, manager: GuestService) -> None:
    start(manager, exit_policy=limits("report", io={"second": 0}))
    manager.restart(OPERATOR, "web", 1)
    assert manager.exit_policies.check() is None


def test_request_cannot_weaken_the_policy_of_the_host(world: World) -> None:
    host = ExitBudgets.model_validate(limits("kill", io={"second": 10}))
    manager = open_manager(world, replace(world.server.policy, exit_policies=ExitPolicies(host)))
    world.hypervisor.watch_ends(manager.reconciler.on_guest_ended)
    start(manager, exit_policy=limits("report", io={}, cpuid={"second": 0}))
    manager.exit_policies.check()
    show(world, web={IO: 500, CPUID: 1})
    manager.exit_policies.check()
    until(lambda: state(manager) == "stopped")
    assert sorted(detail.rpartition("; ")[2] for _, detail in reports(manager)) == ["killed", "reported"]
    manager.close()


@pytest.mark.parametrize("calls", [True, False])
def test_images_that_make_the_call_have_a_default(world: World, manager: GuestService, calls: bool) -> None:
    image = read_image(world.folder / "images" / IMAGE)
    write_description(image.folder, image.model_copy(update={"disengages": calls}))
    start(manager)
    assert manager.exit_policies.check() == (14.5 if calls else None)
    show(world, web={IO: 1, HLT: 5000})
    manager.exit_policies.check()
    assert len(reports(manager)) == calls
    assert all("io" in detail and detail.endswith("; reported") for _, detail in reports(manager))


def test_access_to_a_device_is_counted(world: World, manager: GuestService) -> None:
    start(manager, exit_policy=limits("report", mmio={"second": 0}))
    manager.exit_policies.check()
    tracing.show_calls(world.host, {world.hypervisor.read_guest("web").vcpus[0].tid: 7}, event=tracing.MMIO)
    manager.exit_policies.check()
    assert "7 exits of mmio" in reports(manager)[0][1]


def test_minute_of_a_budget_is_judged_as_a_whole(manager: GuestService) -> None:
    """Also by a policy that is not urgent: four rounds later than a reading, and a little more, are within its minute."""
    start(manager, exit_policy=limits("report", io={"minute": 60}))
    pause = manager.exit_policies.check()
    assert pause
    assert 55 < 4 * pause < 59


def test_what_is_not_measured_is_not_judged(world: World, manager: GuestService) -> None:
    start(manager, exit_policy=limits("kill", io={"second": 0}))
    manager.exit_policies.check()
    show(world, dropped=3, web={IO: 900})
    assert manager.exit_policies.check() == 14.5
    assert any("exit policies are not judged: the kernel's histogram is full" in text for text in warned(manager))
    show(world, web={IO: 1800})
    manager.exit_policies.check()
    assert reports(manager) == [], "the exits may be of before the gap"
    show(world, web={IO: 1801})
    manager.exit_policies.check()
    until(lambda: state(manager) == "stopped")
    assert len(reports(manager)) == 1


def test_command_of_an_audit_is_not_held_against_the_guest(world: World, manager: GuestService) -> None:
    """Whether the command begins and ends between two readings, or a reading is in between. A flood that goes on is."""
    start(manager, exit_policy=limits("kill", io={"second": 0}))
    start(manager, name="other", exit_policy=limits("kill", io={"second": 0}))
    watch, uuid = manager.exit_policies, manager.guest(OPERATOR, "web").plan.uuid

    def check(web: int, **others: int) -> str:
        with suppress(NotFound):  # killed meanwhile
            show(world, web={IO: web}, **{name: {IO: count} for name, count in others.items()})
        watch.check()
        return state(manager)

    check(0, other=0)
    with watch.excused(uuid):
        pass
    check(400)
    with watch.excused(uuid):
        check(800)
        check(1200)
    check(1600)
    assert reports(manager) == []
    with watch.excused(uuid):
        check(2000, other=1)
    until(lambda: state(manager, "other") == "stopped")
    assert state(manager) == "running"
    counts = itertools.count(3000)
    until(lambda: check(next(counts)) == "stopped")


def test_host_without_tracing_says_that_policies_are_not_judged(world: World, manager: GuestService) -> None:
    world.host.write_errors[f"{tracing.INSTANCES}/nohype"] = errno.EPERM
    start(manager, exit_policy=limits("kill", io={"second": 0}))
    for _ in range(3):
        assert manager.exit_policies.check() == 14.5
    assert sum("exit policies are not judged" in text for text in warned(manager)) == 1


def test_application_vcpus_have_their_own_budgets(world: World, manager: GuestService) -> None:
    start(manager, cores=1, housekeeping="1", exit_policy={"application": {"all": {"minute": 60}}})
    manager.exit_policies.check()
    show(world, web={HLT: 61})
    manager.exit_policies.check()
    assert "vCPU 0 (application): 61 exits of all" in reports(manager)[0][1]


def test_vcpu_that_the_guest_does_not_have_is_refused(manager: GuestService) -> None:
    with pytest.raises(RequestError, match="guest web has no vCPU 9: it gets the vCPUs 0 to"):
        create(manager, housekeeping="0,9")


@pytest.mark.parametrize(
    ("housekeeping", "kind"), [(None, "application"), ("0-1", "application"), ("0", None), ("0", "housekeeping")]
)
def test_budgets_that_would_limit_no_vcpu_are_refused(manager: GuestService, housekeeping: str | None, kind: str | None) -> None:
    """The guest has two vCPUs."""
    policy = {kind or "application": {"io": "0/s"}}
    if kind == "application":
        with pytest.raises(RequestError, match="guest web has no application vCPU"):
            create(manager, cores=1, housekeeping=housekeeping, exit_policy=policy)
    else:
        create(manager, cores=1, housekeeping=housekeeping, exit_policy=policy)


def test_policy_survives_the_manager(world: World, manager: GuestService) -> None:
    start(manager, exit_policy=limits("kill", io={"second": 0}))
    manager.close()
    again = open_manager(world)
    world.hypervisor.watch_ends(again.reconciler.on_guest_ended)
    assert again.exit_policies.check() == 1
    show(world, web={IO: 5})
    again.exit_policies.check()
    until(lambda: state(again) == "stopped")
    again.close()


def test_guest_that_was_started_again_meanwhile_is_not_stopped(world: World, manager: GuestService, ledger: Ledger) -> None:
    start(manager, exit_policy=limits("kill", io={"second": 0}))
    manager.exit_policies.check()
    show(world, web={IO: 5})
    with manager.transitions.guest_locks("web"):
        manager.exit_policies.check()
        claim = ledger.find("web")
        assert claim
        manager.transitions.start(manager.transitions.stop(claim, "operator", 0), "operator")
    until(lambda: not any(thread.name == "exit-policy" for thread in threading.enumerate()))
    assert state(manager) == "running"
    assert reports(manager) == []


def test_guest_that_never_disengages_is_judged_after_its_time(world: World) -> None:
    host = ExitBudgets.model_validate({**limits("kill", io={"second": 10}), "boot_seconds": 1})
    manager = open_manager(world, replace(world.server.policy, exit_policies=ExitPolicies(host)))
    create(manager, disengage_after=86_400)
    assert manager.disengagements.check() is None
    assert manager.exit_policies.check() == 1
    manager.close()
