"""core-quiet: what happened on a guest's cores since its start is counted and named, and limits a pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.audit.core_history import History, add_history
from orchestrator.audit.core_quiet import INTERRUPTS, SOFTIRQS
from orchestrator.host.processes import Thread
from orchestrator.model.core_start import CoreStart, Switches
from orchestrator.model.proof import WEAKER, Measurement, Verdict, not_measured
from orchestrator.values import CpuSet

CORES = CpuSet.parse("2-3")
VCPUS = frozenset({10, 11})
START = CoreStart("boot-1", 9, 100.0, 104.0, True, {"LOC": 50, "24": 5}, {"TIMER": 3}, 200, (Switches(10, "CPU 0/KVM", 4),))
PASSED = Measurement(Verdict.PASS, 0, ("CPUs 2-3, during 5.0 s",))


def make_thread(tid: int, name: str, *, kernel: bool = True, allowed: str = "2") -> Thread:
    return Thread(tid, tid, name, CpuSet.parse(allowed), 2, kernel, kernel, 1.0)


def grow(**changes: object) -> CoreStart:
    """An hour later."""
    return replace(START, time=START.time + 3600, at_launch=False, **changes)  # type: ignore[arg-type]


def judge(now: CoreStart, *threads: Thread, start: CoreStart = START, result: Measurement = PASSED) -> Measurement:
    return add_history(result, History(start, now, {"24": "PCI-MSIX nic0"}), VCPUS, CORES, threads)


def switched(*more: Switches, slices: int | None = None) -> CoreStart:
    counts = (Switches(10, "CPU 0/KVM", 4), *more)
    return grow(switches=counts, slices=200 + sum(one.count for one in more) if slices is None else slices)


def limits(proof: Measurement) -> list[str]:
    return [line.removeprefix(WEAKER) for line in proof.evidence if line.startswith(WEAKER)]


def test_silent_hour_has_no_limit() -> None:
    proof = judge(grow())
    assert (proof.verdict, proof.figure, limits(proof)) == (Verdict.PASS, 0, [])
    assert proof.values == {"since_start_seconds": 3600, "since_start_unexpected": 0}
    assert "since the start of the guest, 3600 s ago" in proof.evidence[-1]


def test_what_cannot_be_kept_away_is_counted_and_named() -> None:
    proof = judge(grow(interrupts={name: 70 for name in INTERRUPTS}, softirqs={name: 8 for name in SOFTIRQS}))
    assert limits(proof) == []
    assert f"{70 - 50} interrupts LOC" in proof.evidence[-1]
    assert all(f" interrupts {name}" in proof.evidence[-1] for name in INTERRUPTS)
    assert all(f" softirqs {name}" in proof.evidence[-1] for name in SOFTIRQS)


def test_vcpus_are_counted() -> None:
    assert "30 time slices of the guest's vCPUs" in judge(switched(Switches(11, "CPU 1/KVM", 30))).evidence[-1]


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (grow(interrupts={"LOC": 50, "24": 12}), "7 unexpected: 7 interrupts 24 (PCI-MSIX nic0)"),
        (grow(interrupts={"LOC": 50, "24": 2}), "2 unexpected: 2 interrupts 24"),  # removed, and given to another device
        (grow(softirqs={"TIMER": 3, "NET_RX": 4}), "4 unexpected: 4 softirqs NET_RX"),
        (switched(Switches(70, "sh", 3)), "3 unexpected: 3 time slices of sh (70)"),
        (switched(Switches(70, "kworker/u8:1", 3)), "time slices of kworker/u8:1 (70)"),
        (switched(Switches(70, "kworker/5:1", 3)), "time slices of kworker/5:1 (70)"),
        (switched(slices=211), "11 unexpected: 11 time slices of threads whose names the kernel did not count"),
    ],
)
def test_what_can_be_kept_away_limits_the_pass(now: CoreStart, text: str) -> None:
    proof = judge(now)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    (limit,) = limits(proof)
    assert text in limit
    assert proof.values["since_start_unexpected"] == int(limit.partition(" unexpected")[0].rpartition(" ")[2])


@pytest.mark.parametrize("name", ["migration/2", "ksoftirqd/3", "kworker/2:1", "kworker/3:0H", "cpuhp/2"])
def test_per_cpu_kernel_thread_that_has_ended_is_known_by_its_name(name: str) -> None:
    proof = judge(switched(Switches(70, name, 3)))
    assert limits(proof) == []
    assert f"3 time slices of {name} (70), which has ended, by its name" in proof.evidence[-1]


@pytest.mark.parametrize(
    ("name", "whole"),
    [("kworker/2:1", "kworker/2:1-events"), ("kworker/2:1", "kworker/2:1+mm"), ("migration/2", "migration/2"),
     ("irq/147-nvme0q1", "irq/147-nvme0q12-with-a-long-name")],
)  # fmt: skip
def test_kernel_thread_that_runs_is_known_by_its_flags(name: str, whole: str) -> None:
    proof = judge(switched(Switches(70, name, 3)), make_thread(70, whole))
    assert f"3 time slices of {name} (70), which the kernel pins" in proof.evidence[-1]


@pytest.mark.parametrize("name", ["k", "kworker/2", "sh"])
def test_program_whose_id_a_kernel_thread_has_now_is_unexpected(name: str) -> None:
    assert limits(judge(switched(Switches(70, name, 3)), make_thread(70, "kworker/2:1-events")))


def test_program_with_the_name_of_a_kernel_thread_is_unexpected() -> None:
    assert limits(judge(switched(Switches(70, "kworker/2:1", 3)), make_thread(70, "kworker/2:1", kernel=False)))


def test_counts_that_began_anew_are_not_negative() -> None:
    proof = judge(grow(switches=(Switches(10, "CPU 0/KVM", 1),), slices=205))
    assert limits(proof) == [
        "since the start of the guest, 3600 s ago, 4 unexpected: 4 time slices of threads whose names the kernel did not count"
    ]


@pytest.mark.parametrize("change", [{"boot": "boot-2"}, {"pid": 8}, {"started": 99.0}])
def test_record_of_another_run_is_not_used(change: dict[str, object]) -> None:
    proof = judge(grow(interrupts={"24": 900}), start=replace(START, **change))  # type: ignore[arg-type]
    assert limits(proof) == [
        "what happened on the cores since the start of the guest is not known: the record is of an earlier run of the guest"
    ]
    assert proof.values == {}


def test_count_that_began_late_is_named() -> None:
    (limit,) = limits(judge(grow(), start=replace(START, at_launch=False, time=160.0)))
    assert limit == "the count began 60 s after the start of the guest, when a manager adopted it"


def test_host_that_counts_no_switches_says_why() -> None:
    (limit,) = limits(judge(grow(), start=replace(START, switches=None, why="the kernel is locked down")))
    assert limit == "threads that ran on the cores since the start are not counted: the kernel is locked down"


def test_kernel_that_counts_no_slices_still_names_threads() -> None:
    proof = judge(replace(switched(Switches(70, "sh", 3)), slices=None), start=replace(START, slices=None))
    assert "3 time slices of sh (70)" in limits(proof)[0]


def test_unknown_start_is_named() -> None:
    proof = add_history(PASSED, "no manager recorded the start", VCPUS, CORES, ())
    assert limits(proof) == [
        "what happened on the cores since the start of the guest is not known: no manager recorded the start"
    ]


def test_long_list_is_cut() -> None:
    proof = judge(switched(*(Switches(tid, "sh", 1) for tid in range(70, 90))))
    assert limits(proof)[0].endswith("; and 8 more")


def test_proof_that_was_not_measured_stays_so() -> None:
    assert judge(grow(), result=not_measured("no")) == not_measured("no")


def test_failed_window_stays_failed() -> None:
    assert judge(grow(), result=Measurement(Verdict.FAIL, 3, ("3 softirqs NET_RX",))).verdict == Verdict.FAIL
