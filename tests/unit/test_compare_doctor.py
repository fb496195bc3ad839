"""benchmarks/compare_doctor.py: a failure that another program finds and the doctor does not is found."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.doctor.catalogue import CHECKS
from orchestrator.host.run import Completed

FOLDER = Path(__file__).parents[2] / "benchmarks"

# Recorded from libvirt 9.0.0 and tuned 2.20.0 on one machine, shortened.
LIBVIRT = """\
  QEMU: Checking for hardware virtualization                                 : FAIL (Host not compatible with KVM)
  QEMU: Checking if device /dev/vhost-net exists                             : WARN (Load the 'vhost_net' module)
  QEMU: Checking for cgroup 'cpuset' controller support                      : PASS
  QEMU: Checking for device assignment IOMMU support                         : WARN (Unknown if this platform has IOMMU support)
"""
TUNED = """\
loading profile: realtime-virtual-host
verify: failed: 'vm.stat_interval' = '1', expected '10'
verify: passed: 'kernel.numa_balancing' = ''
verify: failed: cmdline arg 'nohz_full' is missing, expected 'nohz_full=1'
verify: failed: cmdline arg 'nohz_full' is missing, expected 'nohz_full=1'
verify: failed: '/sys/kernel/mm/ksm/run' = '', expected '2'
script '/usr/lib/tuned/realtime-virtual-host/script.sh' returned error code: 1
verify: failed: '['/usr/lib/tuned/realtime/script.sh', '/usr/lib/tuned/realtime-virtual-host/script.sh']'
"""


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("compare_doctor_points")


@pytest.fixture
def program(points: Any) -> Any:
    return importlib.import_module("compare_doctor")


def make_doctor(**found: tuple[str, str]) -> dict[str, dict[str, str]]:
    """All checks pass but those of `found`, with the verdict and the text of each."""
    checks = {check.name: ("pass", "") for check in CHECKS} | {name.replace("_", "-"): value for name, value in found.items()}
    return {name: {"name": name, "verdict": verdict, "found": text} for name, (verdict, text) in checks.items()}


def list_missed(points: Any, readings: list[Any], doctor: dict[str, dict[str, str]]) -> set[str]:
    return {row.point for row in points.compare(readings, doctor) if row.missed}


def test_points_name_checks_that_exist(points: Any) -> None:
    assert {name for point in points.POINTS for name, _ in point.checks} <= {check.name for check in CHECKS}
    assert all(bool(point.differs) == bool(point.reason) for point in points.POINTS)
    assert all(point.checks or point.differs for point in points.POINTS)


def test_failures_that_the_doctor_shares_are_not_missed(points: Any) -> None:
    readings = points.parse_libvirt(LIBVIRT) + points.parse_tuned(TUNED)
    doctor = make_doctor(
        virtualization=("not measured", "this server is a guest"), software_edge=("fail", ""), iommu=("fail", "no IOMMU groups"),
        isolation=("fail", "nohz_full is none, stat_interval is 1"), kvm_parameters=("fail", "kvmclock_periodic_sync is Y"),
    )  # fmt: skip
    rows = {row.point: row for row in points.compare(readings, doctor)}
    assert not [row.point for row in rows.values() if row.missed]
    assert rows["virtualization of the processor"].doctor == "not measured"
    assert rows["stat_interval"].verdicts == {points.LIBVIRT: "-", points.TUNED: "FAIL", points.FIRECRACKER: "-"}
    assert rows["control groups"].verdicts[points.LIBVIRT] == "pass"
    assert rows["merging of pages"].reasons


def test_failure_that_the_doctor_does_not_report_is_missed(points: Any) -> None:
    readings = points.parse_libvirt(LIBVIRT) + points.parse_tuned(TUNED)
    missed = list_missed(points, readings, make_doctor())
    assert missed == {"virtualization of the processor", "IOMMU", "nohz_full", "stat_interval", "KVM's parameters"}


def test_failure_of_another_setting_of_the_same_check_is_no_answer(points: Any) -> None:
    readings = points.parse_tuned("verify: failed: 'vm.stat_interval' = '1', expected '10'")
    assert list_missed(points, readings, make_doctor(isolation=("fail", "nohz_full is none"))) == {"stat_interval"}
    assert not list_missed(points, readings, make_doctor(isolation=("fail", "nohz_full is none, stat_interval is 1")))


@pytest.mark.parametrize(
    ("line", "explained"),
    [
        ("'/sys/kernel/mm/ksm/run' = '', expected '2'", True),
        ("'/sys/kernel/mm/ksm/run' = '1', expected '2'", False),
        ("'kernel.timer_migration' = '1', expected ''", True),
        ("'kernel.timer_migration' = '0', expected '1'", False),
        ("'transparent_hugepages' = 'madvise', expected 'never'", True),
        ("'transparent_hugepages' = 'always', expected 'never'", False),
        ("cmdline arg 'isolcpus=nohz,domain,2-7', expected 'isolcpus=2-7'", True),
        ("cmdline arg 'isolcpus' is missing, expected 'isolcpus=2-7'", False),
        ("'kernel.some_new_setting' = '1', expected '0'", False),
    ],
)
def test_reasons_explain_only_the_value_that_they_are_about(points: Any, line: str, explained: bool) -> None:
    missed = list_missed(points, points.parse_tuned(f"verify: failed: {line}"), make_doctor())
    assert (not missed) == explained


def test_summary_of_scripts_is_not_an_item_of_its_own(points: Any) -> None:
    items = [reading.item for reading in points.parse_tuned(TUNED)]
    assert len(items) == len(set(items)) == 5


def add(root: Path, **files: str) -> None:
    names = {
        "smt": "sys/devices/system/cpu/smt/control", "ksm": "sys/kernel/mm/ksm/run", "swaps": "proc/swaps",
        "nx": "sys/module/kvm/parameters/nx_huge_pages", "multihit": "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
        "l1tf": "sys/devices/system/cpu/vulnerabilities/l1tf",
    }  # fmt: skip
    for name, text in files.items():
        (root / names[name]).parent.mkdir(parents=True, exist_ok=True)
        (root / names[name]).write_text(f"{text}\n")


def test_checklist_reads_the_files_that_it_names(program: Any, tmp_path: Path) -> None:
    add(
        tmp_path,
        smt="notsupported",
        ksm="0",
        swaps="Filename Type Size",
        nx="never",
        multihit="Not affected",
        l1tf="Not affected",
    )
    assert [reading.item for reading in program.read_checklist(tmp_path) if reading.failed] == ["/dev/kvm"]
    add(tmp_path, smt="on", ksm="1", swaps="Filename Type Size\n/swap file 1", nx="N", l1tf="Vulnerable")
    failed = {reading.item for reading in program.read_checklist(tmp_path) if reading.failed}
    assert failed == {"SMT", "KSM", "swap", "nx_huge_pages", "l1tf", "/dev/kvm"}
    add(tmp_path, multihit="KVM: Mitigation: Split huge pages")
    assert "nx_huge_pages" not in {reading.item for reading in program.read_checklist(tmp_path)}


@pytest.mark.parametrize(("stat_interval", "status"), [("stat_interval is 1", 0), ("nohz_full is none", 1)])
def test_status_tells_whether_the_doctor_misses_anything(
    program: Any,
    points: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stat_interval: str,
    status: int,
) -> None:
    document = {"checks": list(make_doctor(isolation=("fail", stat_interval)).values())}
    monkeypatch.setattr(program, "run", lambda *_, **__: Completed(1, json.dumps(document), ""))
    monkeypatch.setattr(program, "read_libvirt", lambda: None)
    monkeypatch.setattr(
        program, "read_tuned", lambda *_: points.parse_tuned("verify: failed: 'vm.stat_interval' = '1', expected '10'")
    )
    monkeypatch.setattr(program, "read_checklist", list)
    assert program.main([]) == status
    assert ("MISSED: stat_interval" in capsys.readouterr().out) == bool(status)


def test_without_any_program_nothing_is_compared(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"checks": list(make_doctor().values())}
    monkeypatch.setattr(program, "run", lambda *_, **__: Completed(0, json.dumps(document), ""))
    monkeypatch.setattr(program, "read_libvirt", lambda: None)
    monkeypatch.setattr(program, "read_tuned", lambda *_: None)
    monkeypatch.setattr(program, "read_checklist", list)
    assert program.main([]) == 2
