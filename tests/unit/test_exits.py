"""Exit rates by class, and the policy: passes on an idle guest's real counters; a missing counter is never a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from orchestrator.audit.exits import prove_exits
from orchestrator.model.exits import CLASSES, ExitPolicy, ExitSample, add_vcpus, classify, measure_rates
from orchestrator.model.proof import Measurement, Verdict
from tests.harness.audit_data import load_exits

POLICY = ExitPolicy(total=2000, emulated=10)
BEFORE, AFTER = load_exits()


def add(counters: Mapping[str, int], **more: int) -> dict[str, int]:
    return {**counters, **{key: counters[key] + value for key, value in more.items()}}


def judge(after: ExitSample, before: ExitSample = BEFORE, policy: ExitPolicy = POLICY) -> Measurement:
    return prove_exits(before, after, policy)


def busier(**more: int) -> ExitSample:
    """The second sample with more of some exits on the second vCPU."""
    return replace(AFTER, vcpus=(AFTER.vcpus[0], add(AFTER.vcpus[1], **more)))


def without(counter: str) -> ExitSample:
    return replace(AFTER, vcpus=tuple({key: value for key, value in vcpu.items() if key != counter} for vcpu in AFTER.vcpus))


def test_idle_guest_passes_with_the_busiest_vcpu_as_figure() -> None:
    proof = judge(AFTER)
    rates = measure_rates(BEFORE, AFTER)
    assert proof.verdict == Verdict.PASS
    assert proof.figure == round(max(rate.total for rate in rates if rate.total is not None), 1)
    assert 0 < proof.figure < 200
    assert "halt" in proof.evidence[1]


def test_classes_add_up_to_the_total() -> None:
    for rate in measure_rates(BEFORE, AFTER):
        assert rate.total == pytest.approx(sum(rate.classes.values()))
        assert rate.classes.keys() == {*CLASSES, "other"}


def test_rate_is_per_second() -> None:
    before, after = ExitSample(10.0, ({"exits": 100},)), ExitSample(14.0, ({"exits": 300},))
    assert measure_rates(before, after)[0].total == 50


def test_too_many_exits_fail() -> None:
    proof = judge(busier(exits=30_000))
    assert proof.verdict == Verdict.FAIL
    assert "vCPU 1" in proof.evidence[0]


@pytest.mark.parametrize("counter", ["io_exits", "mmio_exits"])
def test_emulated_devices_in_use_fail_though_the_total_is_small(counter: str) -> None:
    proof = judge(busier(exits=400, **{counter: 400}))
    assert proof.verdict == Verdict.FAIL
    assert "emulated" in proof.evidence[0]


@pytest.mark.parametrize("counter", ["exits", "io_exits", "mmio_exits"])
def test_missing_counter_is_not_measured(counter: str) -> None:
    proof = judge(without(counter))
    assert (proof.verdict, proof.figure) == (Verdict.NOT_MEASURED, None)


def test_missing_counter_does_not_hide_a_fault() -> None:
    busy = busier(exits=30_000)
    vcpus = tuple({key: value for key, value in vcpu.items() if key != "io_exits"} for vcpu in busy.vcpus)
    assert judge(replace(busy, vcpus=vcpus)).verdict == Verdict.FAIL


def test_missing_class_falls_under_other() -> None:
    (rate, *_) = measure_rates(BEFORE, without("halt_exits"))
    assert "halt" not in rate.classes
    assert rate.total == pytest.approx(sum(rate.classes.values()))


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(replace(AFTER, time=BEFORE.time), id="no time passed"),
        pytest.param(replace(AFTER, vcpus=AFTER.vcpus[:1]), id="another number of vCPUs"),
        pytest.param(replace(AFTER, vcpus=tuple(dict.fromkeys(vcpu, 0) for vcpu in AFTER.vcpus)), id="started again"),
        pytest.param(replace(AFTER, vcpus=({}, {})), id="no counters"),
    ],
)
def test_samples_that_do_not_belong_together_are_not_measured(after: ExitSample) -> None:
    assert judge(after).verdict == Verdict.NOT_MEASURED


def test_guest_without_vcpus_is_not_measured() -> None:
    assert judge(replace(AFTER, vcpus=()), replace(BEFORE, vcpus=())).verdict == Verdict.NOT_MEASURED


def test_counters_of_all_vcpus_are_added_and_classified_once() -> None:
    total = add_vcpus(BEFORE.vcpus)
    assert total["exits"] == sum(vcpu["exits"] for vcpu in BEFORE.vcpus)
    assert sum(classify(total).values()) == total["exits"]


def test_counter_that_one_vcpu_lacks_is_not_added() -> None:
    assert add_vcpus(({"exits": 3, "io_exits": 1}, {"exits": 4})) == {"exits": 7}


def test_other_is_known_only_with_the_total() -> None:
    assert classify({"halt_exits": 3}) == {"halt": 3}
    assert classify({"exits": 2, "halt_exits": 3}) == {"halt": 3, "other": 0}
