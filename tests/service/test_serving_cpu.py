"""The threads that serve requests run on one CPU; programs and long work that they start run on all."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import EINVAL
from pathlib import Path

import pytest

from orchestrator import serving_cpu
from orchestrator.host.run import run
from orchestrator.model.proof import Proof
from orchestrator.values import CpuSet
from tests.harness.api_server import PROOF, serve

ALL = CpuSet.of(os.sched_getaffinity(0))
LAST = {max(ALL)}
PRINT = "import os; print(sorted(os.sched_getaffinity(0)))"


def read() -> set[int]:
    return os.sched_getaffinity(0)


def in_thread(work: Callable[[], object]) -> None:
    """Runs ``work`` in a thread of its own: the CPUs of the test's thread stay."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result(60)


def test_thread_stays_on_the_last_cpu_with_the_threads_that_it_starts() -> None:
    found: list[set[int]] = []

    def work() -> None:
        serving_cpu.stay_on_one(ALL)
        found.append(read())
        thread = threading.Thread(target=lambda: found.append(read()))
        thread.start()
        thread.join()
        serving_cpu.leave()
        found.append(read())

    in_thread(work)
    assert found == [LAST, LAST, set(ALL)]
    assert read() == set(ALL)


def test_program_may_run_on_all_cpus() -> None:
    def work() -> None:
        serving_cpu.stay_on_one(ALL)
        assert run([sys.executable, "-c", PRINT]).stdout == f"{sorted(ALL)}\n"
        assert read() == LAST

    in_thread(work)


def test_thread_that_may_run_on_none_of_the_cpus_stays_where_it_is() -> None:
    def work() -> None:
        serving_cpu.stay_on_one(CpuSet.of({4000}))
        assert read() == set(ALL)
        serving_cpu.stay_on_one(CpuSet())
        assert read() == set(ALL)

    in_thread(work)


def test_cpus_that_went_away_are_no_error(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_tid: int, _cpus: object) -> None:
        raise OSError(EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    in_thread(lambda: serving_cpu.stay_on_one(ALL))
    assert "cannot run a thread on CPUs" in caplog.text


def test_requests_are_served_on_one_cpu(tmp_path: Path) -> None:
    found: list[set[int]] = []

    def audit(_frames: int) -> tuple[Proof, ...]:
        found.append(read())
        return (PROOF,)

    with serve(tmp_path, audit=audit, cpus=ALL) as served:
        served.client.audit(0)
    with serve(tmp_path / "any", audit=audit) as served:
        served.client.audit(0)
    assert found == [LAST, set(ALL)]
