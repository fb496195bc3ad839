"""VM exits by hardware reason: the report per vCPU, and classes of reasons."""

from __future__ import annotations

import pytest

from orchestrator.host.exit_trace import parse_reasons
from orchestrator.model.exit_reasons import CLASSES, ExitTrace, build_report, group_by_class
from tests.fakes import tracing


def test_report_joins_threads_and_counters() -> None:
    report = build_report((71, 72), ({"exits": 660}, {"exits": 9}), ExitTrace({71: {"msr": 418, "hlt": 200}, 5: {"npf": 1}}, 0))
    assert report.why == ""
    assert report.vcpus[0].reasons == {"msr": 418, "hlt": 200}
    assert report.vcpus[0].uncounted == 42
    assert (report.vcpus[1].total, report.vcpus[1].reasons, report.vcpus[1].uncounted) == (9, {}, 9)


def test_thread_id_of_an_earlier_guest_is_noticed() -> None:
    """Its exits are more than KVM counted for this vCPU."""
    report = build_report((71, 72), ({"exits": 10}, {"exits": 10}), ExitTrace({71: {"hlt": 500}, 72: {"hlt": 10}}, 0))
    assert "vCPU 0 was used by an earlier guest" in report.why
    assert report.vcpus[0].reasons is None
    assert report.vcpus[0].total == 10
    assert report.vcpus[1].reasons == {"hlt": 10}


def test_exit_between_tracepoint_and_counter_is_accepted() -> None:
    report = build_report((71,), ({"exits": 10},), ExitTrace({71: {"hlt": 11}}, 0))
    assert report.why == ""
    assert report.vcpus[0].uncounted == 0


def test_full_histogram_gives_no_reasons() -> None:
    report = build_report((71,), ({"exits": 10},), ExitTrace({71: {"hlt": 3}}, 7))
    assert report.why == "the kernel's histogram is full: 7 exits were not counted"
    assert report.vcpus[0].reasons is None


def test_missing_trace_is_explained() -> None:
    report = build_report((71,), ({"exits": 10},), "exits are not counted by reason: locked down")
    assert report.why == "exits are not counted by reason: locked down"
    assert (report.vcpus[0].total, report.vcpus[0].reasons, report.vcpus[0].uncounted) == (10, None, None)


@pytest.mark.parametrize("counters", [(), ({},), ({"halt_exits": 3},)])
def test_missing_counter_of_kvm_is_unknown(counters: tuple[dict[str, int], ...]) -> None:
    (vcpu,) = build_report((71,), counters, ExitTrace({71: {"hlt": 3}}, 0)).vcpus
    assert (vcpu.total, vcpu.reasons, vcpu.uncounted) == (None, {"hlt": 3}, None)


def test_classes_name_reasons_of_kvm() -> None:
    known = {name for table in parse_reasons(tracing.FORMAT) for name in table.values()}
    assert {name for names in CLASSES.values() for name in names} <= known


def test_each_reason_is_in_one_class() -> None:
    names = [name for names in CLASSES.values() for name in names]
    assert len(names) == len(set(names))


def test_exits_are_grouped_by_class() -> None:
    reasons = {"msr": 3, "hlt": 2, "mwait": 1, "reason 0x555": 4, "PF excp": 1}
    assert group_by_class(reasons) == {"msr": 3, "halt": 3, "other": 5}
