"""What is logged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import Conflict, HypervisorError, LedgerError, NoRoom, NotFound, QuotaExceeded
from orchestrator.guests.refusals import MAX_PER_MINUTE, RefusalLog
from orchestrator.guests.service import GuestService
from orchestrator.ledger import Ledger
from orchestrator.model.access import MANAGER, OPERATOR, Identity, Quota, Role
from orchestrator.model.request import parse_guest_request
from orchestrator.values import CpuSet
from tests.fakes.server import IMAGE
from tests.harness.crash import World
from tests.harness.guests import create, kinds, spoil, state

ANN = Identity("ann", Role.TENANT, "a")


def fill_the_disk(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """No event can be written any more."""

    def fail(*_: object, **__: object) -> None:
        raise LedgerError("database or disk is full")

    monkeypatch.setattr(ledger, "append_event", fail)


@pytest.mark.parametrize("kind", ["failed", "plan-failed", "quarantined"])
def test_tenant_does_not_see_details_of_trouble_events(manager: GuestService, ledger: Ledger, kind: str) -> None:
    ledger.append_event(kind, "web", "VF is in use by domain secret", tenant="a")
    assert "secret" not in str(manager.events(ANN))
    assert "the operator of the host can see" in manager.events(ANN)[-1].detail
    assert "secret" in manager.events(OPERATOR)[-1].detail


def test_host_error_is_logged_as_plan_failed(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_own: object) -> None:
        raise HypervisorError("QEMU of guest secret does not answer")

    monkeypatch.setattr(world.hypervisor, "list_running", fail)
    with pytest.raises(HypervisorError):
        manager.create(ANN, parse_guest_request({"name": "web", "image": IMAGE, "memory": "64M"}))
    with pytest.raises(NotFound):
        manager.create(ANN, parse_guest_request({"name": "web", "image": "none", "memory": "64M"}))
    assert kinds(manager)[-2:] == ["plan-failed", "refused"]


def test_a_quota_counts_before_there_is_room(manager: GuestService) -> None:
    """Whoever has used his quota up does not learn how full the host is."""
    limited = replace(ANN, quota=Quota(cores=1))
    fields = {"name": "web", "image": IMAGE, "memory": "64M"}
    with pytest.raises(QuotaExceeded, match="900 of 1 cores"):
        manager.plan(limited, parse_guest_request({**fields, "cores": 900}))
    with pytest.raises(NoRoom) as caught:
        manager.plan(ANN, parse_guest_request({**fields, "cores": 900}))
    assert caught.value.hint == "ask the operator of the host"
    with pytest.raises(NoRoom, match="nohype survey"):
        manager.plan(OPERATOR, parse_guest_request({**fields, "cores": 900}))


def test_tenant_does_not_see_cleanup_findings(world: World, manager: GuestService) -> None:
    spoil(world, manager.create(ANN, parse_guest_request({"name": "web", "image": IMAGE, "memory": "64M"}))[0].plan)
    with pytest.raises(Conflict, match="cleanup not verified\n"):
        manager.delete(ANN, "web")


def test_a_change_stands_though_its_event_can_not_be_written(
    manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk has just become full. The ledger knows what is so; what was done is not undone for want of its story."""
    fill_the_disk(ledger, monkeypatch)
    create(manager)
    assert state(manager) == "running"
    manager.stop(OPERATOR, "web", 1)
    assert state(manager) == "stopped"
    manager.delete(OPERATOR, "web")
    assert ledger.read().claims == ()
    assert manager.survey().pfs[0].vfs == (), "the host was given back"
    for kind in ("claimed", "started", "stopped", "deleted"):
        assert f"web {kind} by {OPERATOR.name}: " in caplog.text, "the journal has it"


def test_started_event_lists_the_changes(manager: GuestService) -> None:
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
    now: list[float] = [0.0]
    unlogged: list[tuple[str, float]] = []
    log = RefusalLog(ledger, lambda *refusal: unlogged.append(refusal), lambda: now[0])
    before = ledger.last_event()
    for _ in range(MAX_PER_MINUTE * 3):
        log.log("web", NoRoom("no room", ()), OPERATOR, 0.1)
    log.log("web", NoRoom("no room", ()), MANAGER, 0.1)
    events = ledger.events(before)
    assert len(events) == MAX_PER_MINUTE + 2, "one says that there are more, and others are not silenced"
    assert "further ones are not logged" in events[-2].detail
    assert unlogged == [("refused", 0.1)] * 2 * MAX_PER_MINUTE, "each is counted all the same"
    now[0] = 61
    log.log("web", NoRoom("no room" * 1000, ()), OPERATOR, 0.1)
    *_, last = ledger.events(before)
    assert len(ledger.events(before)) == MAX_PER_MINUTE + 3
    assert len(last.detail) < 600


def test_the_newest_events_of_a_tenant(ledger: Ledger) -> None:
    for number in range(5):
        ledger.append_event("cleared", f"a{number}", "", tenant="a")
        ledger.append_event("cleared", f"b{number}", "", tenant="b")
    ledger.append_event("cleared", "b", "", tenant="b")
    assert [event.subject for event in ledger.events(None, 2, "a")] == ["a3", "a4"]
    assert [event.subject for event in ledger.events(None, 2)] == ["b4", "b"]


def test_recovery_reports_progress_per_guest(world: World, manager: GuestService, ledger: Ledger) -> None:
    """systemd is notified before each guest, so that a host with many guests does not time out."""
    for name in ("web", "db"):
        create(manager, name=name)
    ledger.close()
    told: list[int] = []
    world.open_manager()[0].reconciler.recover(lambda: told.append(1))
    assert len(told) == 2


def test_refusal_that_cannot_be_logged_is_still_raised(
    manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(ledger, monkeypatch)
    with pytest.raises(NoRoom):
        create(manager, cores=900)


def test_request_for_a_taken_name_is_logged(manager: GuestService) -> None:
    """Others' names can be probed this way. So is a request id that was already used."""
    create(manager, id="job.1")
    for fields in ({"name": "web"}, {"name": "db", "id": "job.1"}):
        with pytest.raises(Conflict):
            create(manager, **fields)
        last = manager.events(OPERATOR)[-1]
        assert (last.kind, last.subject, last.who) == ("refused", fields["name"], OPERATOR.name)
