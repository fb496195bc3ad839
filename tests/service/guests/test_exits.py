"""VM exits of guests by reason, counted from the first guest to the last."""

from __future__ import annotations

import errno
from uuid import UUID

import pytest

from orchestrator.errors import GuestError, HypervisorError, NotFound
from orchestrator.guests.service import GuestService
from orchestrator.host.exit_trace import is_counting
from orchestrator.host.histogram import INSTANCE
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import OPERATOR, Identity, Role
from tests.fakes import tracing
from tests.harness.crash import World
from tests.harness.guests import create

EXIT = f"{INSTANCE}/events/kvm/kvm_exit"


def show_exits(world: World, counts: dict[tuple[int, int], int], dropped: int = 0) -> None:
    world.host.add("sys/module/kvm_amd/parameters/avic", "N")
    tracing.show_hist(world.host, EXIT, counts, dropped)


def test_exits_are_counted_while_there_are_guests(world: World, manager: GuestService) -> None:
    assert not world.host.exists(INSTANCE)
    create(manager, name="a")
    create(manager, name="b")
    assert is_counting(world.host)
    manager.delete(OPERATOR, "a")
    assert is_counting(world.host)
    manager.delete(OPERATOR, "b")
    assert not world.host.exists(INSTANCE)


def test_guest_sees_its_own_exits(world: World, manager: GuestService) -> None:
    create(manager, name="a")
    create(manager, name="b")
    tids = [vcpu.tid for vcpu in world.hypervisor.read_guest("a").vcpus]
    other = world.hypervisor.read_guest("b").vcpus[0].tid
    show_exits(world, {(tids[0], 0x7C): 418, (tids[0], 0x78): 82, (other, 0x400): 7})
    report = manager.exits.read(OPERATOR, "a")
    assert report.why == ""
    assert report.vcpus[0].reasons == {"msr": 418, "hlt": 82}
    assert report.vcpus[0].uncounted == 500
    assert all(vcpu.reasons == {} for vcpu in report.vcpus[1:])


def test_counting_continues_over_a_restart_of_the_manager(world: World, manager: GuestService) -> None:
    create(manager, name="a")
    (tid, *_) = [vcpu.tid for vcpu in world.hypervisor.read_guest("a").vcpus]
    show_exits(world, {(tid, 0x78): 5})
    manager.close()
    again, _ = world.open_manager()
    again.reconciler.recover()
    world.hypervisor.watch_ends(again.reconciler.on_guest_ended)
    assert again.exits.read(OPERATOR, "a").vcpus[0].reasons == {"hlt": 5}
    again.delete(OPERATOR, "a")
    assert not world.host.exists(INSTANCE)
    again.close()


def test_counting_begins_again_if_another_program_removed_it(world: World, manager: GuestService) -> None:
    create(manager, name="a")
    world.host.remove_folder(INSTANCE)
    assert "not counted by reason" in manager.exits.read(OPERATOR, "a").why
    manager.reconciler.detect_drift()
    assert manager.exits.read(OPERATOR, "a").why == ""


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSPC])
def test_guest_runs_where_reasons_cannot_be_counted(world: World, manager: GuestService, ledger: Ledger, number: int) -> None:
    world.host.write_errors[INSTANCE] = number
    create(manager, name="a")
    warnings = [event.detail for event in ledger.events() if event.kind == EventKind.HOST_WARNING]
    assert any("VM exits are not counted by reason" in text for text in warnings)
    report = manager.exits.read(OPERATOR, "a")
    assert "not counted by reason" in report.why
    assert all((vcpu.total, vcpu.reasons) == (1000, None) for vcpu in report.vcpus)
    manager.delete(OPERATOR, "a")


def test_instance_in_use_is_reported_and_removed_later(world: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager, name="a")
    world.host.write_errors[INSTANCE] = errno.EBUSY
    manager.delete(OPERATOR, "a")
    (failed,) = [event.detail for event in ledger.events() if event.kind == EventKind.UNDO_FAILED]
    assert "it is in use" in failed
    del world.host.write_errors[INSTANCE]
    manager.reconciler.reconcile()
    assert not world.host.exists(INSTANCE)


def test_guest_that_does_not_run_is_refused(manager: GuestService) -> None:
    create(manager, name="a")
    manager.stop(OPERATOR, "a", 1)
    with pytest.raises(GuestError, match="guest a is stopped, not running"):
        manager.exits.read(OPERATOR, "a")


def test_guest_of_another_tenant_is_not_found(manager: GuestService) -> None:
    create(manager, name="a")
    with pytest.raises(NotFound):
        manager.exits.read(Identity("bolt", Role.TENANT, "bolt"), "a")


def test_entries_of_ended_guests_do_not_fill_the_histogram(world: World, manager: GuestService) -> None:
    create(manager, name="a")
    show_exits(world, {(tid, 0x500 + reason): 1 for tid in range(10_000, 10_800) for reason in range(20)}, dropped=9)
    assert "histogram is full" in manager.exits.read(OPERATOR, "a").why
    manager.reconciler.detect_drift()
    assert manager.exits.read(OPERATOR, "a").why == ""


def test_guest_that_cannot_be_read_does_not_hide_the_others(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager, name="a")
    create(manager, name="b")
    uuid, read = world.hypervisor.read_guest("a").uuid, world.hypervisor.read_exits

    def fail(which: UUID) -> tuple[dict[str, int], ...]:
        if which == uuid:
            raise HypervisorError("cannot read the exits: monitor does not respond")
        return read(which)

    monkeypatch.setattr(world.hypervisor, "read_exits", fail)
    assert [name for name, _, _ in manager.exits.read_all(world.hypervisor.read_exits)] == ["b"]


def test_guest_that_has_just_ended_is_named(manager: GuestService, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    create(manager, name="a")
    uuid = world.hypervisor.read_guest("a").uuid

    def fail(which: UUID) -> tuple[dict[str, int], ...]:
        raise NotFound(f"guest {which} is not running", "")

    monkeypatch.setattr(world.hypervisor, "read_exits", fail)
    with pytest.raises(GuestError, match="guest a has ended") as caught:
        manager.exits.read(OPERATOR, "a")
    assert str(uuid) not in caught.value.message
