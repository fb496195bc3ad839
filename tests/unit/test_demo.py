"""The demonstration's own proof, and its report."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.lab.demo import Report, prove_restored
from orchestrator.model.plain import to_plain
from orchestrator.model.proof import Verdict

BEFORE = {"isolated": "2-7", "pfs": [{"address": "0000:41:00.0", "vfs": []}], "pools": [{"node": 0, "free": 256}]}


def test_a_host_as_before_is_restored() -> None:
    assert prove_restored(BEFORE, json.loads(json.dumps(BEFORE))).verdict == Verdict.PASS


def test_each_part_that_differs_is_named() -> None:
    proof = prove_restored(BEFORE, {**BEFORE, "pfs": [{"address": "0000:41:00.0", "vfs": [1]}], "pools": []})
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 2)
    assert [line.partition(":")[0] for line in proof.evidence[:2]] == ["pfs", "pools"]


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    report = Report("pass", {"lab": "demo"}, [{"name": "guest1"}], to_plain((prove_restored(BEFORE, BEFORE),)), {"survey": 1.5})
    report.write(tmp_path / "new" / "report.json")
    read = json.loads((tmp_path / "new" / "report.json").read_text())
    assert list(read) == ["verdict", "host", "guests", "proofs", "timings"]
    assert set(read["proofs"][0]) == {"name", "subject", "verdict", "figure", "unit", "evidence"}
