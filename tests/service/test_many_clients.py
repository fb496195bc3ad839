"""Clients that make and delete guests all at once get what they asked for or an honest "no room" (benchmarks/many_clients.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.fakehost import Server


@pytest.fixture
def benchmark_module() -> ModuleType:
    """The benchmark, which is no part of a package."""
    path = Path(__file__).parents[2] / "benchmarks" / "many_clients.py"
    spec = importlib.util.spec_from_file_location("many_clients", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["many_clients"] = module
    spec.loader.exec_module(module)
    return module


def test_nobody_gets_a_conflict(tmp_path: Path, benchmark_module: ModuleType) -> None:
    server = Server(cores=16, nodes=2, vfs=16, pages=2048)
    figures = benchmark_module.measure(tmp_path, requests=160, clients=16, processes=1, server=server)
    assert figures.wrong == set()
    assert figures.left == []
    assert {"done", "no-room"} == {answer for _, answer, _ in figures.answers}
