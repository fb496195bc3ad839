"""The benchmark of claim cycles runs, over HTTP too, and releases what it claims (benchmarks/claim_cycles.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("http", [False, True])
def test_all_cycles_are_measured(tmp_path: Path, *, http: bool) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "claim_cycles.py"
    spec = importlib.util.spec_from_file_location("claim_cycles", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["claim_cycles"] = module
    spec.loader.exec_module(module)
    loads = [module.Load(1, 4), module.Load(2, 2), module.Load(2, 2, rate=1000.0)]
    counts = [len(figures.create) for _, figures in module.measure(tmp_path, 8, loads, http=http)]
    assert counts == [4, 4, 4]
