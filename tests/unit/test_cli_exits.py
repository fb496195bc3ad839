"""`nohype exits`: what it prints. The manager is a fake here."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import connection
from orchestrator.cli.main import nohype
from tests.harness.pauses import record_pauses

VCPUS = [
    {"total": 660, "reasons": {"msr": 418, "hlt": 200}, "uncounted": 42},
    {"total": 9, "reasons": {"hlt": 8, "mwait": 1}, "uncounted": 0},
]
REPORT: dict[str, Any] = {"vcpus": VCPUS, "why": ""}
WITHOUT: dict[str, Any] = {
    "vcpus": [{"total": 660, "reasons": None, "uncounted": None}],
    "why": "the kernel is locked down\x1b[2J",
}


class FakeClient:
    answers: list[dict[str, Any]] = []

    def __init__(self, where: object = None, on_slow: object = None) -> None:
        pass

    def exits(self, name: str, *, phase: str | None = None) -> dict[str, Any]:
        if phase:
            return {"vcpus": [{"total": 5, "reasons": {phase: 5}, "uncounted": 0}], "why": ""}
        if len(self.answers) > 1:
            return self.answers.pop(0)
        if self.answers[0] is ENDED:
            raise KeyboardInterrupt
        return self.answers[0]


ENDED: dict[str, Any] = {}


def run(monkeypatch: pytest.MonkeyPatch, *words: str, answers: tuple[dict[str, Any], ...] = (REPORT,)) -> Result:
    monkeypatch.setattr(connection, "Client", FakeClient)
    monkeypatch.setattr(FakeClient, "answers", [*answers])
    return CliRunner().invoke(nohype, ["exits", "web", *words])


def test_reasons_are_shown_per_vcpu_highest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(monkeypatch).output.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["REASON", "VCPU", "0", "VCPU", "1", "ALL"],
        ["msr", "418", "0", "418"], ["hlt", "200", "8", "208"], ["mwait", "0", "1", "1"],
    ]  # fmt: skip
    assert lines[4] == "before reasons were counted (vCPU 0: 42)"


@pytest.mark.parametrize(
    ("by", "row"),
    [("class", ["halt", "200", "9", "209"]), ("vcpu", ["total", "660", "9", "669"]), ("reason", ["msr", "418", "0", "418"])],
)
def test_exits_are_added_up(monkeypatch: pytest.MonkeyPatch, by: str, row: list[str]) -> None:
    assert row in [line.split() for line in run(monkeypatch, "--by", by).output.splitlines()]


def test_missing_reasons_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, answers=(WITHOUT,))
    assert ["total", "660", "660"] in [line.split() for line in result.output.splitlines()]
    assert "reasons not measured: the kernel is locked down\\x1b[2J" in result.output


def test_json_is_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(run(monkeypatch, "--json").output) == REPORT


def test_csv_has_a_row_per_vcpu_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(monkeypatch, "--csv").output.splitlines()
    assert lines == ["vcpu,reason,count", "0,hlt,200", "0,msr,418", "1,hlt,8", "1,mwait,1"]


def test_watch_prints_rates_until_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    later = {"vcpus": [{**VCPUS[0], "reasons": {"msr": 518, "hlt": 200, "io": 50}}, VCPUS[1]], "why": ""}
    restarted = {"vcpus": [{**VCPUS[0], "reasons": {"msr": 10}}, {**VCPUS[1], "reasons": {}}], "why": ""}
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    pauses = record_pauses(monkeypatch)
    result = run(monkeypatch, "--watch", "--interval", "10", "--json", answers=(REPORT, later, restarted, ENDED))
    rates = [json.loads(line)["rates"] for line in result.output.splitlines() if line.startswith("{")]
    assert rates[0] == [{"msr": 10.0, "hlt": 0.0, "io": 5.0}, {"hlt": 0.0, "mwait": 0.0}]
    assert rates[1] == [{"msr": 1.0}, {}]
    assert pauses == [10.0, 10.0, 10.0]


def test_csv_and_json_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "--csv", "--json")
    assert result.exit_code == 2
    assert "exclude each other" in result.output


@pytest.mark.parametrize("by", ["class", "vcpu"])
def test_json_refuses_sums_that_it_does_not_print(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    done = run(monkeypatch, "--json", "--by", by)
    assert done.exit_code == 2
    assert "omit --by" in done.output


@pytest.mark.parametrize("phase", ["boot", "run"])
def test_exits_of_one_phase_are_shown(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    assert [phase, "5", "5"] in [line.split() for line in run(monkeypatch, "--phase", phase).output.splitlines()]


def test_rates_of_one_phase_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "--phase", "boot", "--watch")
    assert result.exit_code == 2
    assert "omit --phase" in result.output
