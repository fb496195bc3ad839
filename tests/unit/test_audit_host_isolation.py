"""host-isolation: passes with all settings as wanted, and tells apart what is wrong, missing, owned by tuned, or unreadable."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.audit.core_quiet import INTERRUPTS, SOFTIRQS
from orchestrator.audit.host_isolation import IsolationFacts, prove_host_isolation
from orchestrator.audit.isolation_facts import read_isolation
from orchestrator.host.irqbalance import Irqbalance
from orchestrator.host.isolation import SETTINGS, Covers, Division, OneOf, Owner, Reading, Setting, Without
from orchestrator.host.survey import read_topology
from orchestrator.host.tuned import Tuned
from orchestrator.model.proof import WEAKER, Measurement, Verdict
from orchestrator.values import CpuSet
from tests.fakes.root import load_host

DIVISION = Division(CpuSet.parse("0-1"), CpuSet.parse("2-7"), CpuSet.parse("2-3"))
DOCUMENT = Path(__file__).parents[2] / "docs" / "isolation.md"


def good(setting: Setting) -> str:
    rule = setting.wanted
    if isinstance(rule, Without):
        return rule.notation.show(DIVISION.housekeeping)
    if isinstance(rule, Covers):
        return str(DIVISION.guest)
    return rule.values[0] if isinstance(rule, OneOf) else str(rule.number)


def bad(setting: Setting) -> str:
    rule = setting.wanted
    if isinstance(rule, Without):
        return rule.notation.show(CpuSet.parse("0-7"))
    return "0" if isinstance(rule, Covers) else "99999" if isinstance(rule, OneOf) else "1"


def prove(
    change: dict[str, str | None] | None = None, *, problem: dict[str, str] | None = None, tuned: Tuned | None = None,
    irqbalance: tuple[Irqbalance, ...] = (), isolated: str = "2-7", has_guests: bool = True,
) -> Measurement:  # fmt: skip
    readings = tuple(
        Reading(setting, None, problem[setting.name])
        if problem and setting.name in problem
        else Reading(setting, {setting.name: good(setting), **(change or {})}[setting.name])
        for setting in SETTINGS
    )
    return prove_host_isolation(
        IsolationFacts(readings, tuned, irqbalance, CpuSet.parse(isolated)), DIVISION, has_guests=has_guests
    )


def test_all_settings_as_wanted_pass() -> None:
    proof = prove()
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert not any(line.startswith(WEAKER) for line in proof.evidence)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_that_differs_fails_with_both_values_and_the_remedy(setting: Setting) -> None:
    proof = prove({setting.name: bad(setting)})
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    for part in (f"{setting.name} is {bad(setting)}", setting.wanted.describe(DIVISION), setting.why, str(setting.owner)):
        assert part in proof.evidence[0]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_kernel_without_a_setting_limits_the_proof(setting: Setting) -> None:
    proof = prove({setting.name: None})
    assert proof.verdict == Verdict.PASS
    assert proof.evidence[0].startswith(f"{WEAKER}this kernel has no /{setting.file}")


def test_setting_that_cannot_be_read_is_not_measured() -> None:
    proof = prove(problem={"ksm": "cannot read /sys/kernel/mm/ksm/run"})
    assert (proof.verdict, proof.figure) == (Verdict.NOT_MEASURED, None)
    assert "ksm: cannot read" in proof.evidence[0]


def test_setting_that_is_wrong_fails_whatever_cannot_be_read() -> None:
    assert prove({"workqueue": "ff"}, problem={"ksm": "cannot read it"}).verdict == Verdict.FAIL


@pytest.mark.parametrize("name", ["workqueue", "nmi_watchdog", "isolcpus"])
def test_setting_of_tuned_limits_the_proof(name: str) -> None:
    setting = next(setting for setting in SETTINGS if setting.name == name)
    proof = prove({name: bad(setting)}, tuned=Tuned(("realtime",), f"x {setting.tuned[0]} y"))
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert "tuned (profile realtime) sets it" in proof.evidence[0]
    other = prove({name: bad(setting)}, tuned=Tuned(("realtime",), "net.ipv4.tcp_fastopen"))
    assert other.verdict == Verdict.FAIL


def test_mitigation_of_the_processor_limits_the_proof() -> None:
    proof = prove({"nx_huge_pages": "Y"})
    assert proof.verdict == Verdict.PASS
    assert "iTLB multihit" in proof.evidence[0]


def test_settings_of_the_manager_count_only_while_there_are_guests() -> None:
    changed = {setting.name: bad(setting) for setting in SETTINGS if setting.owner is Owner.MANAGER}
    assert prove(changed, has_guests=False).verdict == Verdict.PASS
    assert prove(changed).figure == len(changed)


@pytest.mark.parametrize(
    ("banned", "isolated", "verdict"),
    [
        (None, "2-7", Verdict.PASS),
        (None, "", Verdict.FAIL),
        ("2-7", "", Verdict.PASS),
        ("2-3", "2-7", Verdict.FAIL),
        ("", "2-7", Verdict.FAIL),
    ],
)
def test_irqbalance_must_leave_guest_cores_alone(banned: str | None, isolated: str, verdict: Verdict) -> None:
    running = Irqbalance(77, None if banned is None else CpuSet.parse(banned))
    assert prove(irqbalance=(running,), isolated=isolated).verdict == verdict


def read_rows(columns: int) -> list[tuple[str, ...]]:
    """Rows of the document's tables with so many columns, of which the first is code."""
    lines = [line.strip("|").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    return [tuple(cell.strip().strip("`") for cell in cells) for cells in lines if len(cells) == columns]


@pytest.mark.parametrize(("present", "guest"), [("0-5", "2-5"), ("", "2-15")])
def test_cpus_that_are_not_plugged_in_need_no_isolation(tmp_path: Path, present: str, guest: str) -> None:
    """Most servers have numbers for more CPUs than they have; a kernel that does not tell them apart must isolate all."""
    fake = load_host(tmp_path / "host", "numa")
    fake.add("sys/devices/system/cpu/possible", "0-15")
    if present:
        fake.add("sys/devices/system/cpu/present", present)
    _, division = read_isolation(fake, CpuSet.parse("0-1"), (), read_topology(fake), ())
    assert division.guest == CpuSet.parse(guest)


def test_document_lists_each_setting() -> None:
    assert read_rows(5) == [
        (one.name, f"/{one.file}" if "/" in one.file else one.file, str(one.owner), one.why, one.source) for one in SETTINGS
    ]


def test_document_lists_what_cannot_be_kept_away() -> None:
    interrupts = [("interrupt", name, why) for name, why in INTERRUPTS.items()]
    assert read_rows(3) == [*interrupts, *(("softirq", name, why) for name, why in SOFTIRQS.items())]
