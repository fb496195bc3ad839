"""The manager's kernel settings: set after their undo is on disk, restored to the same text, left to others that own them."""

from __future__ import annotations

from dataclasses import replace
from errno import EROFS
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host.isolation import WORKQUEUE, Division, Notation
from orchestrator.ledger import EventKind, Ledger
from orchestrator.resources.isolation import SetCpus, describe_failure, plan_isolation_settings
from orchestrator.resources.step import UndoContext, run_steps, try_steps, undo_steps
from orchestrator.values import CpuSet
from tests.fakes.domains import add_thread
from tests.fakes.root import FakeRoot, build_host

DIVISION = Division(CpuSet.parse("0-1"), CpuSet.parse("2-9"), CpuSet())
MASKS = (f"{WORKQUEUE}/cpumask", f"{WORKQUEUE}/writeback/cpumask", "proc/irq/default_smp_affinity")
WATCHDOG = "proc/sys/kernel/watchdog_cpumask"


@pytest.fixture
def host(tmp_path: Path) -> FakeRoot:
    """A host with ten CPUs, as it boots without any parameter."""
    fake = build_host(tmp_path / "host", "sys/devices/system/cpu/online = 0-9\nsys/devices/system/cpu/possible = 0-9")
    for name in MASKS:
        fake.add(name, "3ff")
    fake.add(WATCHDOG, "0-9")
    return fake


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def isolate(host: FakeRoot, ledger: Ledger) -> tuple[str, ...]:
    return run_steps(host, ledger, "host", plan_isolation_settings(host, DIVISION).steps)


def test_all_settings_are_set_and_restored_to_the_same_text(host: FakeRoot, ledger: Ledger) -> None:
    before = host.tree()
    recorded: list[int] = []
    watched = replace(host, watch=lambda moment, _: recorded.append(len(ledger.undo_records("host"))))
    assert len(isolate(watched, ledger)) == 4
    assert min(recorded) >= 1, "the undo record is on disk before the change"
    assert [host.text(name) for name in (*MASKS, WATCHDOG)] == ["003", "003", "003", "0-1"]
    undo_steps(UndoContext(host), ledger, "host")
    assert host.tree() == before
    assert ledger.undo_records("host") == ()


def test_host_of_the_role_is_not_changed(host: FakeRoot, ledger: Ledger) -> None:
    """Nor one whose settings have fewer CPUs than all for housekeeping."""
    for name in MASKS:
        host.add(name, "001")
    host.add(WATCHDOG, "0-1")
    assert plan_isolation_settings(host, DIVISION).steps == ()


def test_kernel_without_the_files_is_not_changed(tmp_path: Path) -> None:
    host = build_host(tmp_path / "bare", "sys/devices/system/cpu/online = 0-9")
    planned = plan_isolation_settings(host, DIVISION)
    assert (planned.steps, planned.left) == ((), ())


def test_setting_that_another_program_changed_meanwhile_stays_and_is_reported(host: FakeRoot, ledger: Ledger) -> None:
    isolate(host, ledger)
    host.add(MASKS[0], "00f")
    undo_steps(UndoContext(host), ledger, "host")
    assert [host.text(name) for name in (*MASKS, WATCHDOG)] == ["00f", "3ff", "3ff", "0-9"]
    (event,) = [event for event in ledger.events() if event.kind == EventKind.NOT_RESTORED]
    assert event.detail == f"/{MASKS[0]} is 00f, set by another program: it was 3ff"


def test_undo_after_a_reboot_changes_nothing(host: FakeRoot, ledger: Ledger) -> None:
    before = host.tree()
    isolate(host, ledger)
    for name in MASKS:
        host.add(name, "3ff")
    host.add(WATCHDOG, "0-9")
    host.writes.clear()
    undo_steps(UndoContext(host), ledger, "host")
    assert (host.tree(), host.writes) == (before, [])


def test_undo_of_a_change_that_was_never_made_changes_nothing(host: FakeRoot) -> None:
    """The manager was killed between the record and the change."""
    step = SetCpus(MASKS[0], Notation.MASK, DIVISION.housekeeping)
    record = step.read_before(host)
    assert record
    SetCpus.undo(UndoContext(host), record)
    assert host.writes == []
    step.apply(host)
    for _ in range(2):
        assert SetCpus.undo(UndoContext(host), record) is None
    assert host.text(MASKS[0]) == "3ff"


def test_read_only_setting_stops_no_other_and_leaves_no_record(host: FakeRoot, ledger: Ledger) -> None:
    host.write_errors[WATCHDOG] = EROFS
    changed, failed = try_steps(host, ledger, "host", plan_isolation_settings(host, DIVISION).steps)
    assert (len(changed), len(failed), len(ledger.undo_records("host"))) == (3, 1, 3)
    text = describe_failure(*failed[0])
    assert text
    assert f"/{WATCHDOG}" in text
    assert "ReadWritePaths" in text


def test_clamped_setting_is_an_error_with_both_sets_and_undone(host: FakeRoot, ledger: Ledger) -> None:
    step = SetCpus(MASKS[0], Notation.MASK, CpuSet.parse("0,40"))
    with pytest.raises(HostError, match="requested CPUs 0,40, kernel set 0"):
        run_steps(host, ledger, "host", [step])
    undo_steps(UndoContext(host), ledger, "host")
    # What the kernel made of it is neither what was written nor what was there.
    assert [event.kind for event in ledger.events()] == [EventKind.NOT_RESTORED]


def test_settings_of_tuned_are_left_to_it_and_named(host: FakeRoot) -> None:
    host.add("run/tuned/tuned.pid", "400")
    host.add("etc/tuned/active_profile", "partition")
    host.add("usr/lib/tuned/partition/tuned.conf", "[sysfs]\n/sys/devices/virtual/workqueue/cpumask=3ff\n")
    add_thread(host, 400, 400, "tuned", "0-1")
    planned = plan_isolation_settings(host, DIVISION)
    assert [step.file for step in planned.steps] == [MASKS[2], MASKS[1], WATCHDOG]
    assert planned.left == ("workqueue is 3ff: tuned (profile partition) sets it, so the manager does not",)


@pytest.mark.parametrize("text", ["many", "3ff 1", ""])
def test_odd_text_is_named_and_left(host: FakeRoot, text: str) -> None:
    host.add(MASKS[0], text)
    planned = plan_isolation_settings(host, DIVISION)
    assert [step.file for step in planned.steps] == [MASKS[2], MASKS[1], WATCHDOG]
    assert len(planned.left) == 1
    assert "workqueue" in planned.left[0]
