"""Guests whose boot is over: the signals, the record, and what a later start and another manager make of it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time

import pytest

from orchestrator.errors import Forbidden, GuestError, HypervisorError, NotFound
from orchestrator.guests import disengagement, runs
from orchestrator.guests.service import GuestService
from orchestrator.host.histogram import is_counted
from orchestrator.host.thread_counts import CALLS
from orchestrator.images.description import write_description
from orchestrator.images.store import read_image
from orchestrator.ledger import Event, EventKind, Ledger
from orchestrator.model.access import OPERATOR, Identity, Role
from orchestrator.model.disengagement import Phase, Signal
from tests.fakes import tracing
from tests.fakes.server import IMAGE
from tests.harness.crash import World
from tests.harness.guests import create, kinds, open_manager, until, warned

READY = b"nohype: ready name=web\r\n"


def set_calling(world: World, *, calling: bool) -> None:
    image = read_image(world.folder / "images" / IMAGE)
    write_description(image.folder, image.model_copy(update={"disengages": calling}))


def call(world: World, name: str = "web", count: int = 1) -> None:
    tracing.show_calls(world.host, {world.hypervisor.read_guest(name).vcpus[-1].tid: count})


def signal(manager: GuestService, name: str = "web") -> Signal | None:
    end = manager.guest(OPERATOR, name).disengaged
    return end.signal if end else None


def ends(ledger: Ledger) -> list[Event]:
    return [event for event in ledger.events() if event.kind == EventKind.DISENGAGED]


def test_call_of_a_guest_ends_its_boot_only(world: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager, name="web")
    create(manager, name="other")
    assert is_counted(world.host, CALLS)
    assert manager.disengagements.check() is not None
    call(world)
    assert manager.disengagements.check() is not None
    assert (signal(manager), signal(manager, "other")) == (Signal.CALL, None)
    (event,) = ends(ledger)
    assert (event.subject, event.who) == ("web", "manager")
    assert event.detail == "the guest called that its boot is over; 2000 VM exits during boot"
    version = manager.guest(OPERATOR, "web").version
    assert manager.disengagements.check() is not None
    assert manager.guest(OPERATOR, "web").version == version
    call(world, "other")
    assert manager.disengagements.check() is None, "nothing is read once no guest is in its boot"


def test_counts_of_the_boot_are_kept(world: World, manager: GuestService) -> None:
    create(manager)
    first = world.hypervisor.read_guest("web").vcpus[0].tid
    world.host.add("sys/module/kvm_amd/parameters/avic", "N")
    tracing.show_hist(world.host, f"{tracing.INSTANCES}/nohype/{tracing.EXIT}", {(first, 0x7C): 418, (first, 0x7B): 82}, 0)
    call(world)
    manager.disengagements.check()
    end = manager.guest(OPERATOR, "web").disengaged
    assert end
    assert (end.vcpus[0].total, end.vcpus[0].reasons, end.why) == (1000, {"msr": 418, "io": 82}, "")


def test_second_call_is_logged_once_and_changes_nothing(
    world: World, manager: GuestService, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    create(manager)
    create(manager, name="booting")
    call(world)
    manager.disengagements.check()
    before = manager.guest(OPERATOR, "web").disengaged
    with caplog.at_level(logging.WARNING):
        for count in (1, 2, 3):
            call(world, count=count)
            manager.disengagements.check()
    assert [record.message for record in caplog.records] == ["guest web: called again that its boot is over: ignored"]
    assert manager.guest(OPERATOR, "web").disengaged == before
    assert len(ends(ledger)) == 1


@pytest.mark.parametrize(("limit", "over"), [(0.001, True), (86_400, False)])
def test_time_of_the_request_ends_the_boot(world: World, manager: GuestService, limit: float, over: bool) -> None:
    create(manager, disengage_after=limit)
    set_age(world, "web", 60)
    pause = manager.disengagements.check()
    assert signal(manager) is (Signal.TIME if over else None)
    assert pause == (None if over else 1)


def set_age(world: World, name: str, seconds: float) -> None:
    """The guest's vCPUs were created so long ago (starttime in proc_pid_stat(5))."""
    guest = world.hypervisor.read_guest(name)
    started = int((time.clock_gettime(time.CLOCK_BOOTTIME) - seconds) * os.sysconf("SC_CLK_TCK"))
    for vcpu in guest.vcpus:
        stat = f"proc/{guest.pid}/task/{vcpu.tid}/stat"
        fields = world.host.text(stat).split(" ")
        fields[fields.index("S") + 19] = str(started)
        world.host.add(stat, " ".join(fields))


def test_long_boot_is_read_less_often(world: World, manager: GuestService) -> None:
    create(manager)
    set_age(world, "web", 3600)
    assert manager.disengagements.check() == 15


@pytest.mark.parametrize("ready", [True, False])
def test_report_of_an_image_without_the_call_ends_the_boot(world: World, manager: GuestService, ready: bool) -> None:
    set_calling(world, calling=not ready)
    create(manager)
    world.hypervisor.write("web", READY)
    manager.wait_ready(OPERATOR, "web", 20)
    if ready:
        until(lambda: signal(manager))
        assert signal(manager) is Signal.READY
    else:
        assert signal(manager) is None


def test_report_ends_the_boot_if_the_kernel_counts_no_calls(world: World, manager: GuestService) -> None:
    shutil.rmtree(world.host.path / tracing.TRACING)
    create(manager)
    assert not is_counted(world.host, CALLS)
    world.hypervisor.write("web", READY)
    until(lambda: signal(manager))
    assert signal(manager) is Signal.READY


def test_report_does_not_end_the_boot_if_the_request_names_a_time(world: World, manager: GuestService) -> None:
    set_calling(world, calling=False)
    create(manager, disengage_after=3600)
    world.hypervisor.write("web", READY)
    manager.wait_ready(OPERATOR, "web", 20)
    assert signal(manager) is None


def test_report_before_a_restart_of_the_manager_counts(world: World, manager: GuestService) -> None:
    set_calling(world, calling=False)
    create(manager)
    manager.close()
    world.hypervisor.write("web", READY)
    again = open_manager(world)
    until(lambda: signal(again))
    again.close()


def test_request_ends_the_boot_once(manager: GuestService, ledger: Ledger) -> None:
    create(manager)
    first = manager.disengagements.request(OPERATOR, "web")
    assert first.disengaged
    assert manager.disengagements.request(OPERATOR, "web") == first
    (event,) = ends(ledger)
    assert (event.who, event.detail) == ("operator", "on request; 2000 VM exits during boot")


def test_request_of_another_tenant_or_a_viewer_is_refused(manager: GuestService) -> None:
    create(manager)
    with pytest.raises(NotFound):
        manager.disengagements.request(Identity("bolt", Role.TENANT, "bolt"), "web")
    with pytest.raises(Forbidden):
        manager.disengagements.request(Identity("eye", Role.VIEWER), "web")
    assert signal(manager) is None


def test_guest_that_does_not_run_cannot_be_disengaged(manager: GuestService) -> None:
    create(manager)
    manager.stop(OPERATOR, "web", 1)
    with pytest.raises(GuestError, match="guest web is stopped, not running"):
        manager.disengagements.request(OPERATOR, "web")


def test_end_of_the_boot_survives_the_manager(world: World, manager: GuestService) -> None:
    create(manager)
    call(world)
    manager.disengagements.check()
    before = manager.guest(OPERATOR, "web").disengaged
    manager.close()
    again = open_manager(world)
    assert again.guest(OPERATOR, "web").disengaged == before
    assert again.disengagements.check() is None
    again.close()


def test_next_start_is_a_boot_again(world: World, manager: GuestService) -> None:
    create(manager)
    call(world)
    manager.disengagements.check()
    manager.restart(OPERATOR, "web", 1)
    assert signal(manager) is None
    assert manager.disengagements.check() is not None
    assert signal(manager) is None, "the call of the last run is not one of this"
    assert kinds(manager).count("disengaged") == 1


def test_calls_of_an_earlier_thread_do_not_count(world: World, manager: GuestService) -> None:
    create(manager)
    (*_, last) = world.hypervisor.read_guest("web").vcpus
    manager.delete(OPERATOR, "web")
    create(manager, name="keeper", placement={"cpus": "6-7"})
    tracing.show_calls(world.host, {tid: 1 for tid in range(last.tid - 50, last.tid + 200)})
    create(manager)
    manager.disengagements.check()
    assert signal(manager) is None


def test_boot_ends_also_if_exits_cannot_be_read(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager)
    manager.disengagements.check()

    def fail(uuid: object) -> tuple[dict[str, int], ...]:
        raise HypervisorError("cannot read the exits: monitor does not respond")

    monkeypatch.setattr(world.hypervisor, "read_exits", fail)
    call(world)
    manager.disengagements.check()
    end = manager.guest(OPERATOR, "web").disengaged
    assert end
    assert [(vcpu.total, vcpu.reasons) for vcpu in end.vcpus] == [(None, {}), (None, {})]
    assert "monitor does not respond" in end.why
    assert "monitor does not respond" in ends(ledger)[0].detail


def test_guest_whose_qemu_does_not_respond_delays_no_other(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PATIENCE", 0.1)
    for name in ("mute", "web"):
        create(manager, name=name)
    mute, responds, read = world.hypervisor.read_guest("mute").uuid, threading.Event(), world.hypervisor.read_guest
    monkeypatch.setattr(world.hypervisor, "read_guest", lambda which: (which == mute and responds.wait(60), read(which))[1])
    tracing.show_calls(world.host, {vcpu.tid: 1 for name in ("mute", "web") for vcpu in read(name).vcpus})
    until(lambda: manager.disengagements.check() == 1 and signal(manager) is Signal.CALL)
    assert signal(manager, "mute") is None
    for _ in range(3):
        manager.disengagements.check()
    until(lambda: [thread.name for thread in threading.enumerate()].count("ask-guest") == 1)
    responds.set()
    until(lambda: manager.disengagements.check() is None)
    assert signal(manager, "mute") is Signal.CALL


def test_boot_of_a_guest_whose_qemu_does_not_respond_ends(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise no exit policy would ever be judged. The kernel's counts by reason do not need QEMU."""
    monkeypatch.setattr(disengagement, "PATIENCE", 0.1)
    create(manager)
    responds, read = threading.Event(), world.hypervisor.read_exits
    monkeypatch.setattr(world.hypervisor, "read_exits", lambda uuid: (responds.wait(60), read(uuid))[1])
    first, second = (vcpu.tid for vcpu in world.hypervisor.read_guest("web").vcpus)
    world.host.add("sys/module/kvm_amd/parameters/avic", "N")
    event = f"{tracing.INSTANCES}/nohype/{tracing.EXIT}"
    tracing.show_hist(world.host, event, {(first, 0x7C): 418, (second, 0x7B): 82}, 0)
    call(world)
    assert manager.disengagements.check() is None
    responds.set()
    assert signal(manager) is Signal.CALL
    detail = ends(ledger)[0].detail
    assert "500 VM exits during boot, as counted by reason: " in detail
    assert "QEMU did not respond within 0.1 s" in detail
    boot = manager.exits.read(OPERATOR, "web", Phase.BOOT)
    assert [(vcpu.total, vcpu.reasons) for vcpu in boot.vcpus] == [(None, {"msr": 418}), (None, {"io": 82})]
    tracing.show_hist(world.host, event, {(first, 0x7C): 425, (second, 0x7B): 82}, 0)
    run = manager.exits.read(OPERATOR, "web", Phase.RUN)
    assert [(vcpu.total, vcpu.reasons) for vcpu in run.vcpus] == [(None, {"msr": 7}), (None, {})]
    assert "QEMU did not respond" in run.why


@pytest.mark.parametrize("by", ["request", "ready"])
def test_reasons_of_the_boot_are_kept_however_it_ends(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(disengagement, "PATIENCE", 0.1)
    set_calling(world, calling=False)
    create(manager)
    manager.disengagements.check()
    responds, read = threading.Event(), world.hypervisor.read_exits
    monkeypatch.setattr(world.hypervisor, "read_exits", lambda uuid: (responds.wait(60), read(uuid))[1])
    first = world.hypervisor.read_guest("web").vcpus[0].tid
    world.host.add("sys/module/kvm_amd/parameters/avic", "N")
    tracing.show_hist(world.host, f"{tracing.INSTANCES}/nohype/{tracing.EXIT}", {(first, 0x7C): 418}, 0)
    if by == "request":
        manager.disengagements.request(OPERATOR, "web")
    else:
        world.hypervisor.write("web", READY)
    until(lambda: signal(manager))
    responds.set()
    end = manager.guest(OPERATOR, "web").disengaged
    assert end
    assert end.vcpus[0].reasons == {"msr": 418}


def test_boot_of_a_guest_whose_threads_were_never_known_is_not_measured(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disengagement, "PATIENCE", 0.1)
    create(manager)
    responds, read = threading.Event(), world.hypervisor.read_exits
    monkeypatch.setattr(world.hypervisor, "read_exits", lambda uuid: (responds.wait(60), read(uuid))[1])
    manager.disengagements.request(OPERATOR, "web")
    responds.set()
    end = manager.guest(OPERATOR, "web").disengaged
    assert end
    assert (end.vcpus, end.why) == ((), "KVM's totals of the boot could not be read: QEMU did not respond within 0.1 s")


def test_guest_without_tracing_can_still_be_disengaged(world: World, manager: GuestService) -> None:
    world.host.write_errors[f"{tracing.INSTANCES}/nohype"] = errno.EPERM
    create(manager)
    assert manager.disengagements.check() is not None
    manager.disengagements.request(OPERATOR, "web")
    end = manager.guest(OPERATOR, "web").disengaged
    assert end
    assert "not counted by reason" in end.why
    assert end.vcpus[0].reasons is None


def test_thread_notices_the_call_and_sleeps_afterwards(world: World, manager: GuestService) -> None:
    manager.exit_watch.start()
    create(manager)
    call(world)
    until(lambda: signal(manager))


def test_exits_are_shown_by_phase(world: World, manager: GuestService) -> None:
    create(manager)
    world.host.add("sys/module/kvm_amd/parameters/avic", "N")
    first = world.hypervisor.read_guest("web").vcpus[0].tid
    event = f"{tracing.INSTANCES}/nohype/{tracing.EXIT}"
    tracing.show_hist(world.host, event, {(first, 0x7B): 400}, 0)
    with pytest.raises(GuestError, match="guest web is in its boot"):
        manager.exits.read(OPERATOR, "web", Phase.RUN)
    assert manager.exits.read(OPERATOR, "web", Phase.BOOT).vcpus[0].reasons == {"io": 400}
    assert [(name, phase) for name, phase, _ in manager.exits.read_all(world.hypervisor.read_exits)] == [("web", Phase.BOOT)]
    manager.disengagements.request(OPERATOR, "web")
    tracing.show_hist(world.host, event, {(first, 0x7B): 400, (first, 0x78): 7}, 0)
    assert manager.exits.read(OPERATOR, "web").vcpus[0].reasons == {"io": 400, "hlt": 7}
    counts = {phase: report.vcpus[0].reasons for _, phase, report in manager.exits.read_all(world.hypervisor.read_exits)}
    assert counts == {Phase.BOOT: {"io": 400}, Phase.RUN: {"hlt": 7}}
    for phase, reasons in counts.items():
        assert manager.exits.read(OPERATOR, "web", phase).vcpus[0].reasons == reasons


def test_trace_instance_is_removed_also_if_calls_could_not_be_counted(world: World, manager: GuestService) -> None:
    before = world.host.tree()
    world.host.write_errors[f"{tracing.INSTANCES}/nohype/events/kvm/{CALLS.event}/trigger"] = errno.ENOMEM
    create(manager)
    assert any("VM exits are not counted by reason" in text for text in warned(manager))
    manager.reconciler.detect_drift()
    manager.delete(OPERATOR, "web")
    assert not (world.host.path / tracing.INSTANCES / "nohype").exists()
    assert world.host.tree() == before
