"""Switches to threads on guest CPUs, counted by the kernel in a trace instance."""

from __future__ import annotations

import os
import subprocess

import pytest

from orchestrator.errors import HostError
from orchestrator.host.activity import read_activity
from orchestrator.host.core_counts import read_core_now, read_core_start
from orchestrator.host.histogram import INSTANCE
from orchestrator.host.root import HostRoot
from orchestrator.host.switch_trace import begin_switches, end_switches, is_counting, make_room, read_switches, sum_switches
from orchestrator.model.core_start import Switches
from orchestrator.resources.step import UndoContext
from orchestrator.resources.switch_trace import CountSwitches
from orchestrator.values import CpuSet
from tests.fakes import tracing
from tests.fakes.root import FakeRoot

HOUSEKEEPING = CpuSet.parse("0-1")
TRIGGER = f"{INSTANCE}/events/sched/sched_switch/trigger"


def read_on(host: HostRoot, cpus: str) -> tuple[Switches, ...]:
    return sum_switches(read_switches(host), CpuSet.parse(cpus))


def list_triggers(host: HostRoot) -> list[str]:
    return [line for line in host.read(TRIGGER).splitlines() if not line.startswith("#")]


def test_counting_begins_and_ends(traced: HostRoot) -> None:
    for _ in range(2):
        begin_switches(traced, HOUSEKEEPING)
        assert is_counting(traced, HOUSEKEEPING)
    assert len(list_triggers(traced)) == 1
    for _ in range(2):
        end_switches(traced)
        assert list_triggers(traced) == []


@pytest.mark.parametrize("before", ["0", "1", "0-1,10"])
def test_trigger_for_other_housekeeping_cpus_is_replaced(traced: HostRoot, before: str) -> None:
    """Also if its filter is a part of the other."""
    for first, second in ((CpuSet.parse(before), HOUSEKEEPING), (HOUSEKEEPING, CpuSet.parse(before))):
        begin_switches(traced, first)
        assert not is_counting(traced, second)
        begin_switches(traced, second)
        assert is_counting(traced, second)
        (trigger,) = list_triggers(traced)
        assert trigger.count("CPU != ") == len(second)


def test_step_sets_the_trigger_and_its_undo_removes_it(traced: HostRoot) -> None:
    step = CountSwitches(HOUSEKEEPING)
    assert step.read_before(traced) == {}
    step.apply(traced)
    assert step.read_before(traced) is None
    for _ in range(2):
        CountSwitches.undo(UndoContext(traced), {})
        assert list_triggers(traced) == []


def run_on_guest_cpu(cpu: int, line: str) -> None:
    """In a slice of its own: all others may only use housekeeping CPUs."""
    words = ["systemd-run", "--quiet", "--wait", "--collect", "--slice", "intruder", "-p", f"CPUAffinity={cpu}"]
    subprocess.run([*words, "sh", "-c", line], check=True)


def test_thread_that_has_ended_is_named_with_its_cpu(real: HostRoot, traced: HostRoot) -> None:
    begin_switches(traced, HOUSEKEEPING)
    run_on_guest_cpu(2, "printf passer-by > /proc/self/comm; sleep 0.1")
    assert "passer-by" in {one.name for one in read_on(traced, "2")}
    assert "passer-by" not in {one.name for one in read_on(traced, "3")}


def test_every_time_slice_of_a_cpu_is_a_counted_switch(real: HostRoot, traced: HostRoot) -> None:
    begin_switches(traced, HOUSEKEEPING)
    cpus = CpuSet.parse("2-3")
    start = read_core_start(traced, os.getpid(), cpus, at_launch=True)
    run_on_guest_cpu(2, "for i in 1 2 3 4 5; do sleep 0.01; done")
    now = read_core_now(traced, os.getpid(), read_activity(traced, cpus), lambda: read_on(traced, str(cpus)))
    assert start.switches is not None
    assert now.switches is not None
    assert start.slices is not None
    assert now.slices is not None
    counted = sum(one.count for one in now.switches) - sum(one.count for one in start.switches)
    assert 5 <= now.slices - start.slices <= counted


def test_switches_of_one_thread_are_the_sum_over_the_cpus(traced: HostRoot, fake: FakeRoot) -> None:
    begin_switches(fake, HOUSEKEEPING)
    tracing.show_switches(fake, {("sh", 2, 70): 3, ("sh", 3, 70): 4, ("sh", 4, 70): 5, ("CPU 0/KVM", 2, 71): 9})
    assert read_on(fake, "2-3") == (Switches(70, "sh", 7), Switches(71, "CPU 0/KVM", 9))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("} hitcount: 9", "} hitcount: 9"), ("a\nb", "b"), ("\n", "?"), ("", "?"), ("a, b: 1", "a, b: 1"), ("\x1b[2J", "?[2J"),
        ("x, next_pid: 1", "x, next_pid: 1"),
    ],
)  # fmt: skip
def test_name_that_imitates_the_format_hides_no_thread(traced: HostRoot, fake: FakeRoot, name: str, shown: str) -> None:
    begin_switches(fake, HOUSEKEEPING)
    tracing.show_switches(fake, {(name, 2, 70): 3, ("sh", 2, 71): 4})
    assert read_on(fake, "2") == (Switches(70, shown, 3), Switches(71, "sh", 4))


@pytest.mark.parametrize(("entries", "dropped", "left"), [(3072, 0, 3072), (3073, 0, 0), (5, 1, 0)])
def test_room_is_made_in_a_histogram_that_is_almost_full(
    traced: HostRoot, fake: FakeRoot, entries: int, dropped: int, left: int
) -> None:
    begin_switches(fake, HOUSEKEEPING)
    tracing.show_switches(fake, {("sh", 2, tid): 1 for tid in range(1, entries + 1)}, dropped)
    make_room(fake, HOUSEKEEPING)
    assert len(read_on(fake, "2")) == left
    assert is_counting(fake, HOUSEKEEPING)


def test_host_without_the_trigger_is_an_error_only_for_readers(traced: HostRoot, fake: FakeRoot) -> None:
    make_room(fake, HOUSEKEEPING)
    with pytest.raises(HostError):
        read_on(fake, "2")
    assert not is_counting(fake, HOUSEKEEPING)


def test_kernel_without_the_tracepoint_is_an_error(traced: HostRoot, fake: FakeRoot) -> None:
    (fake.path / TRIGGER).unlink()
    with pytest.raises(HostError, match="sched_switch does not exist"):
        begin_switches(fake, HOUSEKEEPING)
