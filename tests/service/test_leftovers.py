"""A run of pytest that is killed leaves no program behind, whatever sessions and children the program has made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = "from tests.conftest import pytest_configure as pytest_configure\n"
TEST = """
from pathlib import Path
from orchestrator.host.run import run

def test_it():
    program = "sleep 1000 & setsid sleep 1001 & (setsid sh -c 'sleep 1002 & sleep 1003' &); sleep 0.5; touch started; wait"
    run(["sh", "-c", program], cwd=Path.cwd())
"""


def find_sleepers(folder: Path) -> list[int]:
    """Programs whose working directory is the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(path.name)] if os.readlink(path / "cwd") == str(folder) else []
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("words", [["-p", "no:xdist"], ["-n", "1"]], ids=["alone", "xdist"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_leaves_no_program(tmp_path: Path, words: list[str], number: signal.Signals) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, "."]
    with subprocess.Popen(argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL) as process:
        with subprocess.Popen(["sleep", "1000"], cwd=tmp_path) as other:
            wait_for((tmp_path / "started").exists)
            assert len(find_sleepers(tmp_path)) > 5
            process.send_signal(number)
            process.wait(60)
            wait_for(lambda: find_sleepers(tmp_path) == [other.pid])
            assert other.poll() is None, "a program of another run"
            other.kill()
