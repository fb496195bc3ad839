"""VM exits before and after the end of a guest's boot."""

from __future__ import annotations

import pytest

from orchestrator.model.disengagement import Disengagement, Signal, count_boot, count_run
from orchestrator.model.exit_reasons import ExitReport, VcpuExits
from orchestrator.model.plain import from_plain, to_plain

TIME = "2026-11-26T20:00:00.000+00:00"
AT = Disengagement(TIME, Signal.CALL, (VcpuExits(1000, {"io": 900, "msr": 60}, 40), VcpuExits(10, {"hlt": 10}, 0)))


def run(*vcpus: VcpuExits, why: str = "", at: Disengagement = AT) -> ExitReport:
    return count_run(at, ExitReport(vcpus, why))


def test_boot_is_what_was_counted_until_its_end() -> None:
    assert count_boot(AT).vcpus[0] == VcpuExits(1000, {"io": 900, "msr": 60}, 40)


def test_run_is_what_was_counted_since() -> None:
    report = run(VcpuExits(1100, {"io": 900, "msr": 150, "hlt": 10}, 40), VcpuExits(10, {"hlt": 10}, 0))
    assert report.vcpus == (VcpuExits(100, {"msr": 90, "hlt": 10}, 0), VcpuExits(0, {}, 0))
    assert report.why == ""


@pytest.mark.parametrize(
    "now",
    [
        VcpuExits(1100, {"msr": 30}, 1070),  # a count fell
        VcpuExits(9000, {"io": 900, "msr": 70}, 8030),  # none fell, but those of the boot are missing
    ],
)
def test_histogram_that_began_anew_is_noticed(now: VcpuExits) -> None:
    vcpu = run(now, VcpuExits(10, {"hlt": 10}, 0)).vcpus[0]
    assert now.total is not None
    assert now.reasons is not None
    assert vcpu.reasons == now.reasons
    assert vcpu.total == now.total - 1000
    assert vcpu.uncounted == vcpu.total - sum(now.reasons.values())


@pytest.mark.parametrize(
    ("at", "now"),
    [
        (VcpuExits(1000, None, None), VcpuExits(1100, {"io": 5}, 1095)),
        (VcpuExits(1000, {"io": 5}, 995), VcpuExits(1100, None, None)),
    ],
)
def test_missing_reasons_are_not_measured(at: VcpuExits, now: VcpuExits) -> None:
    report = run(now, at=Disengagement(TIME, Signal.TIME, (at,), "locked down"))
    assert report.vcpus == (VcpuExits(100, None, None),)
    assert report.why == "locked down"


def test_boot_that_could_not_be_read_leaves_the_run_unmeasured() -> None:
    report = run(VcpuExits(5, {}, 5), at=Disengagement(TIME, Signal.REQUEST, (), "libvirt did not respond"))
    assert report == ExitReport((VcpuExits(None, None, None),), "libvirt did not respond")


def test_record_is_read_as_it_was_written() -> None:
    end = Disengagement(TIME, Signal.READY, (VcpuExits(3, {"a": 3}, 0), VcpuExits(None, None, None)))
    assert from_plain(Disengagement, to_plain(end)) == end
