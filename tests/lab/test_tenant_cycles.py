"""What a guest leaves on its disk and in its memory is not found by the next one (benchmarks/tenant_cycles.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestrator.host.run import run
from orchestrator.images.wheels import source_tree
from tests.lab.conftest import LabHost

SCRIPT = Path("benchmarks/tenant_cycles.py")
CYCLES = 3


@pytest.mark.soak
def test_next_guest_finds_nothing_of_the_last(host: LabHost) -> None:
    done = run(
        [sys.executable, source_tree() / SCRIPT, str(CYCLES)], timeout=800, env={"NOHYPE_TEST_LAB": host.lab.name}, check=False
    )
    assert done.status == 0, done.stdout + done.stderr
    broken, *_, total = map(json.loads, done.stdout.splitlines())
    assert "not empty" in broken["refused"]
    assert broken["found_on_disk"]
    assert (total["cycles"], total["hits"]) == (CYCLES, 0)
