"""Clients that make, stop and delete guests all at once get what they asked for or an honest "no room"
(benchmarks/many_clients.py).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from tests.fakes.server import Server


def make_figures(module: ModuleType, asked: int, answers: list[tuple[str, str, float]]) -> Any:
    """Of a run in which nothing else went wrong."""
    lock = module.TimedQueue()
    lock.run(lambda: None)
    return module.Figures(asked, answers, lock, [], [])


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
    figures = benchmark_module.measure(tmp_path, requests=250, clients=16, processes=1, server=server)
    assert figures.wrong == set()
    assert figures.left == []
    assert len(figures.answers) == figures.asked == 250
    done = {kind for kind, answer, _ in figures.answers if answer == "done"}
    assert done == {"create", "stop", "start", "delete"}
    assert {"done", "no-room"} == {answer for _, answer, _ in figures.answers}


def test_a_client_that_fails_is_not_overlooked(
    tmp_path: Path, benchmark_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("the answer cannot be read")

    monkeypatch.setattr(benchmark_module.Client, "delete", fail)
    answers: list[tuple[str, str, float]] = []
    benchmark_module.play_client(tmp_path / "nobody-listens", 0, 3, answers)
    assert len(answers) == 3
    faults = make_figures(benchmark_module, 3, answers).find_faults()
    assert [fault for fault in faults if "wrong answer: create: " in fault]
    assert benchmark_module.ask(benchmark_module.Client(tmp_path), "delete", "web", Random(0)).startswith(
        "ValueError: the answer"
    )


def test_a_request_without_an_answer_is_not_overlooked(benchmark_module: ModuleType) -> None:
    answers = [("create", "done", 0.1), ("create", "no-room", 0.1)]
    assert make_figures(benchmark_module, 2, answers).find_faults() == []
    assert make_figures(benchmark_module, 3, answers).find_faults() == ["3 requests were to be made, 2 were answered"]
    faults = make_figures(benchmark_module, 1, [("stop", "no-room", 0.1)]).find_faults()
    assert faults == ["wrong answer: stop: no-room"]


def test_a_process_of_clients_that_dies_is_not_overlooked(
    tmp_path: Path, benchmark_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_module, "play_clients", lambda *_: os._exit(1))
    figures = benchmark_module.measure(tmp_path, requests=10, clients=2, processes=1, server=Server(cores=8))
    assert "10 requests were to be made, 0 were answered" in figures.find_faults()


def test_all_requests_are_shared_out(benchmark_module: ModuleType) -> None:
    shares = [benchmark_module.share(10_000, 64, number) for number in range(64)]
    assert sum(shares) == 10_000
    assert max(shares) - min(shares) == 1
