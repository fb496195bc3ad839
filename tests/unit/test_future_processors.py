"""docs/future-processors.md is what its data says, and the data names only what exists."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import future_processors

    return future_processors


@pytest.fixture
def figures(script: Any) -> Any:
    return {**json.loads(script.FIGURES.read_text()), "seconds": 60}


@pytest.fixture
def facts(script: Any) -> Any:
    return tomllib.loads(script.FACTS.read_text())


def test_document_is_up_to_date(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["future_processors.py", "--check"])
    assert script.main() == 0, "run benchmarks/future_processors.py"


def test_changed_figure_makes_the_document_outdated(
    script: Any, figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures["vcpus"][1]["exits"]["msr"] += 60
    (tmp_path / "figures").write_text(json.dumps(figures))
    monkeypatch.setattr(script, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr("sys.argv", ["future_processors.py", "--check"])
    assert script.main() == 1


def test_every_feature_has_sources_and_every_cell_is_one_line(facts: Any) -> None:
    assert all(feature["sources"] for feature in facts["feature"])
    cells = [text for rows in facts.values() for row in rows for text in row.values() if isinstance(text, str)]
    assert not [text for text in cells if "\n" in text or "|" in text or not text]


def rows(text: str, start: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {start}")]


def test_reckoned_figures_leave_out_what_is_removed(script: Any, figures: Any, facts: Any) -> None:
    figures["vcpus"] = [{"name": "x", "exits": {"msr": 120, "vintr": 60, "hlt": 30}}]
    text = script.build(figures, facts)
    assert rows(text, "measured, without any") == [["measured, without any", "3.50"]]
    assert rows(text, "AMD today: AVIC |") == [["AMD today: AVIC", "2.50 *reckoned*"]]
    assert rows(text, "the same, HLT") == [["the same, HLT not intercepted", "0.00 *reckoned*"]]


def test_measured_figure_replaces_a_reckoned_one(script: Any, figures: Any, facts: Any) -> None:
    figures["vcpus"] = [{"name": "x", "exits": {"vintr": 60}, "with": {"AMD today: AVIC": {"msr": 30}}}]
    assert rows(script.build(figures, facts), "AMD today: AVIC |") == [["AMD today: AVIC", "0.50"]]


def test_reason_that_nothing_removes_is_named(script: Any, figures: Any, facts: Any) -> None:
    figures["vcpus"] = [{"name": "x", "exits": {"cpuid": 3}}]
    assert rows(script.build(figures, facts), "`cpuid`") == [["`cpuid`", "3", "nothing known"]]


def test_unknown_reason_feature_or_proof_is_refused(script: Any, figures: Any, facts: Any) -> None:
    wrong = {**figures, "vcpus": [{"name": "x", "exits": {"nonsense": 3}}]}
    with pytest.raises(ValueError, match="unknown reasons: nonsense"):
        script.build(wrong, facts)
    with pytest.raises(ValueError, match="unknown features: nonsense"):
        script.build(figures, {**facts, "combination": [{"name": "x", "features": ["nonsense"]}]})
    with pytest.raises(ValueError, match="unknown proofs: nonsense"):
        script.build(figures, {**facts, "proof": [{**facts["proof"][0], "name": "nonsense"}]})
