"""Some hundred generated requests in each role; `benchmarks/api_fuzz.py` sends ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.api_fuzz import ROLES, fuzz, serve_target


@pytest.mark.timeout(1200)
def test_generated_requests_cause_no_error_and_reveal_no_foreign_data(tmp_path: Path) -> None:
    with serve_target(tmp_path) as target:
        outcome = fuzz(target, cases=300, seed=3)
    assert outcome.faults == []
    for role in ROLES:
        assert sum(count for (of, _), count in outcome.answers.items() if of == role) >= 100
    # What was sent was not all refused for the same reason.
    assert {status for role, status in outcome.answers if role == "acme"} >= {200, 400, 403, 404, 409}
    assert 201 in {status for _, status in outcome.answers}
    assert len(outcome.operations) == sum(len(path) for path in target.document["paths"].values())
