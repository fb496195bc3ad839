"""The report of the demo."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.audit.catalogue import HOST_RESTORED
from orchestrator.audit.restored import Surveys
from orchestrator.lab.demo import Report
from orchestrator.model.plain import to_plain


def test_report_is_complete(tmp_path: Path) -> None:
    proof = HOST_RESTORED.prove(Surveys({}, {}))
    report = Report("pass", {"lab": "demo"}, [{"name": "guest1"}], to_plain((proof,)), {"survey": 1.5})
    report.write(tmp_path / "new" / "report.json")
    read = json.loads((tmp_path / "new" / "report.json").read_text())
    assert list(read) == ["verdict", "host", "guests", "proofs", "timings"]
    assert set(read["proofs"][0]) == {"name", "subject", "verdict", "figure", "unit", "evidence", "readings", "values"}
