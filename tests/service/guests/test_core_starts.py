"""The counters of a guest's cores are recorded at its start, for this run only."""

from __future__ import annotations

import errno
import sqlite3

import pytest

from orchestrator.guests.service import GuestService
from orchestrator.host.histogram import INSTANCE
from orchestrator.host.switch_trace import is_counting
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.core_start import CoreStart, Switches
from orchestrator.values import CpuSet
from tests.fakes import tracing
from tests.harness.crash import World
from tests.harness.guests import create
from tests.harness.isolation import add_isolation


@pytest.fixture
def counted(world: World, manager: GuestService) -> World:
    add_isolation(world.host)
    return world


def find(ledger: Ledger, name: str = "web") -> CoreStart | None:
    claim = ledger.find(name)
    assert claim
    return ledger.core_start(claim.plan.uuid)


def test_start_records_the_counters_of_the_guests_cpus(counted: World, manager: GuestService, ledger: Ledger) -> None:
    plan = create(manager, name="web")
    found = find(ledger)
    assert found
    cpus = len(CpuSet.of(plan.cpus))
    assert (found.interrupts["LOC"], found.softirqs["TIMER"], found.slices) == (9 * cpus, 9 * cpus, 100 * cpus)
    assert (found.pid, found.at_launch) == (counted.hypervisor.read_guest("web").pid, True)
    assert found.switches == ()


def test_switches_are_counted_while_there_are_guests(counted: World, manager: GuestService) -> None:
    housekeeping = counted.server.policy.housekeeping
    assert not is_counting(counted.host, housekeeping)
    create(manager, name="web")
    assert is_counting(counted.host, housekeeping)
    manager.delete(OPERATOR, "web")
    assert not counted.host.exists(INSTANCE)


def test_each_start_has_its_own_record(counted: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager, name="web")
    first = find(ledger)
    manager.restart(OPERATOR, "web", 0)
    second = find(ledger)
    assert first
    assert second
    assert (first.pid, first.started) != (second.pid, second.started)
    manager.delete(OPERATOR, "web")
    with sqlite3.connect(counted.folder / "ledger.sqlite") as database:
        assert database.execute("SELECT count(*) FROM core_start").fetchone() == (0,)


def test_restarted_manager_keeps_the_record(counted: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager, name="web")
    before = find(ledger)
    tracing.show_switches(counted.host, {("sh", 2, 70): 3})
    manager.close()
    ledger.close()
    again, reopened = counted.open_manager()
    again.reconciler.recover()
    assert find(reopened) == before
    again.close()


def test_guest_without_a_record_is_counted_from_its_adoption(counted: World, manager: GuestService, ledger: Ledger) -> None:
    """As after an update of the manager."""
    plan = create(manager, name="web")
    with sqlite3.connect(counted.folder / "ledger.sqlite") as database:
        database.execute("DELETE FROM core_start")
    cpu = min(CpuSet.of(plan.cpus))
    tracing.show_switches(counted.host, {("sh", cpu, 70): 3})
    manager.close()
    again, reopened = counted.open_manager()
    again.reconciler.recover()
    found = find(reopened)
    assert found
    assert (found.at_launch, found.switches) == (False, (Switches(70, "sh", 3),))
    again.close()


def test_guest_runs_where_nothing_can_be_recorded(
    world: World, manager: GuestService, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    world.host.add("proc/interrupts", "nonsense")
    create(manager, name="web")
    assert find(ledger) is None
    assert "guest web: counters of its cores are not recorded: /proc/interrupts does not show CPUs" in caplog.text


def test_host_without_tracing_records_the_other_counters(counted: World, manager: GuestService, ledger: Ledger) -> None:
    counted.host.write_errors[INSTANCE] = errno.EPERM
    create(manager, name="web")
    found = find(ledger)
    assert found
    assert found.switches is None
    assert "cannot read" in found.why
    assert found.interrupts


def test_trigger_that_cannot_be_set_is_reported(counted: World, manager: GuestService, ledger: Ledger) -> None:
    counted.host.write_errors[f"{INSTANCE}/events/sched/sched_switch/trigger"] = errno.ENOMEM
    create(manager, name="web")
    warnings = [event.detail for event in ledger.events() if event.kind == EventKind.HOST_WARNING]
    assert any("thread switches on guest CPUs are not counted" in text for text in warnings)
