"""core-quiet: passes with what cannot be kept away, and fails for each interrupt, softirq and thread that can."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.audit.core_quiet import INTERRUPTS, SOFTIRQS, Sample, prove_core_quiet
from orchestrator.host.activity import Activity
from orchestrator.host.processes import Thread
from orchestrator.model.proof import WEAKER, Measurement, Verdict
from orchestrator.values import CpuSet

CORES = CpuSet.parse("2-3")
VCPUS = frozenset({10, 11})


def make_thread(tid: int, name: str, allowed: str, last_cpu: int = 2, **more: bool) -> Thread:
    flags = {"kernel": True, "pinned_by_kernel": True, **more}
    return Thread(tid, tid, name, CpuSet.parse(allowed), last_cpu, started=1.0, **flags)


MIGRATION = make_thread(20, "migration/2", "2")
THREADS = (
    make_thread(10, "CPU 0/KVM", "2", kernel=False, pinned_by_kernel=False),
    make_thread(11, "CPU 1/KVM", "3", 3, kernel=False, pinned_by_kernel=False),
    MIGRATION,
)
FIRST = Sample(
    100.0, Activity({"LOC": 10, "24": 5}, {"TIMER": 3, "NET_RX": 1}, 1000, {"24": "PCI-MSIX nic0", "LOC": "Local timer"}),
    {10: 50, 11: 60, 20: 7}, {10: 50, 11: 60, 20: 7}, THREADS,
)  # fmt: skip


def grow(
    *, interrupts: dict[str, int] | None = None, softirqs: dict[str, int] | None = None, slices: int = 0, vcpu: int = 0,
    others: dict[int, int] | None = None, threads: tuple[Thread, ...] = THREADS,
) -> Sample:  # fmt: skip
    """A minute after the first sample; by how much each counter has grown."""
    activity = FIRST.activity
    counts = {**{tid: 0 for tid in others or {}}, 20: 7, 10: 50 + vcpu, 11: 60}
    counts |= {tid: counts[tid] + growth for tid, growth in (others or {}).items()}
    merged = [{name: old.get(name, 0) + (new or {}).get(name, 0) for name in {**old, **(new or {})}}
              for old, new in ((activity.interrupts, interrupts), (activity.softirqs, softirqs))]  # fmt: skip
    assert activity.slices is not None
    now = replace(activity, interrupts=merged[0], softirqs=merged[1], slices=activity.slices + slices)
    return Sample(160.0, now, counts, counts, threads)


def quiet(last: Sample, first: Sample = FIRST) -> Measurement:
    return prove_core_quiet(VCPUS, CORES, first, last)


def test_silent_cores_pass() -> None:
    proof = quiet(grow())
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert "CPUs 2-3, during 60.0 s" in proof.evidence


def test_what_cannot_be_kept_away_is_named_and_counted() -> None:
    last = grow(interrupts={name: 7 for name in INTERRUPTS}, softirqs={name: 8 for name in SOFTIRQS}, slices=3, others={20: 3})
    proof = quiet(last)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    for name, why in INTERRUPTS.items():
        assert f"7 interrupts {name}: {why}" in proof.evidence
    for name, why in SOFTIRQS.items():
        assert f"8 softirqs {name}: {why}" in proof.evidence
    assert "3 time slices of migration/2 (20): the kernel pins it" in proof.evidence


@pytest.mark.parametrize("name", ["24", "NMI", "MCE", "PMI", "31"])
def test_interrupt_that_is_not_listed_fails(name: str) -> None:
    proof = quiet(grow(interrupts={name: 4}))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 4)
    assert proof.evidence[0].startswith(f"4 interrupts {name}")


def test_interrupt_of_a_device_is_named() -> None:
    assert quiet(grow(interrupts={"24": 4})).evidence[0] == "4 interrupts 24 (PCI-MSIX nic0)"


@pytest.mark.parametrize("name", ["NET_RX", "NET_TX", "BLOCK", "TASKLET", "HI", "IRQ_POLL", "NEW"])
def test_softirq_of_io_fails(name: str) -> None:
    proof = quiet(grow(softirqs={name: 2}))
    assert (proof.verdict, proof.figure, proof.evidence[0]) == (Verdict.FAIL, 2, f"2 softirqs {name}")


@pytest.mark.parametrize(
    "thread",
    [
        make_thread(30, "kswapd0", "0-3", pinned_by_kernel=False),
        make_thread(30, "kworker/u16:1", "0-3"),
        make_thread(30, "kworker/R-rcu_gp", "0-7"),
        make_thread(30, "postgres", "2", kernel=False, pinned_by_kernel=False),
        make_thread(30, "rcuop/2", "2", pinned_by_kernel=False),
    ],
    ids=lambda thread: thread.name,
)
def test_thread_that_could_run_elsewhere_fails(thread: Thread) -> None:
    proof = quiet(grow(slices=9, others={30: 9}, threads=(*THREADS, thread)))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 9)
    assert f"9 time slices of {thread.name}" in proof.evidence[0]


def test_rescuer_that_ran_elsewhere_passes() -> None:
    rescuer = make_thread(30, "kworker/R-rcu_gp", "0-7", last_cpu=0)
    assert quiet(grow(others={30: 9}, threads=(*THREADS, rescuer))).verdict == Verdict.PASS


def test_thread_that_ended_meanwhile_fails() -> None:
    proof = quiet(grow(slices=12 + 5, vcpu=12))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 5)
    assert proof.evidence[0] == "5 time slices of threads that ended, began or moved during the measurement"


def test_vcpus_that_run_between_two_readings_are_no_finding() -> None:
    """Threads are read before and after their CPUs: what grows meanwhile is counted on one side only."""
    last = grow(slices=12, vcpu=12)
    last = replace(last, before={**last.before, 10: last.before[10] - 2}, after={**last.after, 10: last.after[10] + 3})
    assert quiet(last).verdict == Verdict.PASS


def test_kernel_without_slices_of_cpus_limits_the_proof() -> None:
    first = replace(FIRST, activity=replace(FIRST.activity, slices=None))
    proof = quiet(grow(), first)
    assert proof.verdict == Verdict.PASS
    assert proof.evidence[-1].startswith(WEAKER)
    busy = make_thread(30, "postgres", "2", kernel=False, pinned_by_kernel=False)
    assert quiet(grow(others={30: 9}, threads=(*THREADS, busy)), first).figure == 9


def test_guest_that_ended_meanwhile_is_not_measured() -> None:
    last = grow()
    gone = replace(last, before={tid: count for tid, count in last.before.items() if tid != 11})
    assert quiet(gone).verdict == Verdict.NOT_MEASURED
    assert quiet(last, replace(FIRST, after={10: 50})).verdict == Verdict.NOT_MEASURED
