"""The threads that serve requests run on one CPU; programs and long work that they start run on all."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from errno import EINVAL
from pathlib import Path
from types import ModuleType

import pytest

from orchestrator import serving_cpu
from orchestrator.errors import HostError
from orchestrator.guests import boot_images
from orchestrator.host.run import run
from orchestrator.model.access import OPERATOR
from orchestrator.model.plan import BootPolicy
from orchestrator.model.proof import Proof
from orchestrator.model.request import parse_guest_request
from orchestrator.resources import disk
from orchestrator.values import CpuSet
from tests.fakes.server import IMAGE, Server
from tests.harness.api_server import PROOF, serve
from tests.harness.crash import World

ALL = CpuSet.of(os.sched_getaffinity(0))
LAST = {max(ALL)}
SERVER = Server(cores=4, nodes=1, vfs=3, pages=600, disks=1)
URL = "http://127.0.0.1/boot/"
BOOT = {f"{file}{end}": text for file in ("kernel", "initrd") for end, text in (("", f"{URL}vmlinuz"), ("_sha256", "0" * 64))}
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

    def audit(_frames: int, **_: object) -> tuple[Proof, ...]:
        found.append(read())
        return (PROOF,)

    with serve(tmp_path, audit=audit, cpus=ALL) as served:
        served.client.audit(0)
    with serve(tmp_path / "any", audit=audit) as served:
        served.client.audit(0)
    assert found == [LAST, set(ALL)]


@pytest.mark.parametrize(
    ("module", "function", "fields"),
    [
        (disk, "find_data", {"image": IMAGE, "disks": [{}]}),
        (boot_images, "download", {"boot": BOOT}),
    ],
)
def test_long_work_of_a_request_may_run_on_all_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str, fields: dict[str, object]
) -> None:
    found: list[set[int]] = []

    def work(*_: object, **__: object) -> None:
        found.append(read())
        raise HostError("enough")

    monkeypatch.setattr(module, function, work)

    def create() -> None:
        serving_cpu.stay_on_one(ALL)
        with pytest.raises(HostError, match="enough"):
            manager.create(OPERATOR, parse_guest_request({"name": "web", "memory": "128M", **fields}))
        found.append(read())

    world = World(tmp_path, SERVER)
    manager, _ = world.open_manager(replace(SERVER.policy, boot=BootPolicy((URL,), 1 << 20, 60)))
    in_thread(create)
    assert found[:1] + found[-1:] == [set(ALL), LAST]
