"""`make test`: what runs next to the tests neither hides a failed test nor outlives an interruption."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.images.wheels import source_tree
from orchestrator.waiting import wait_until

NAMES = ("build", "tests")
WAIT = "echo $$ >{}.pid; exec sleep 600"


@contextmanager
def making(folder: Path, build: str, tests: str) -> Iterator[subprocess.Popen[bytes]]:
    """`make test` with shell programs in place of `nohype` and `pytest`."""
    programs = folder / "venv/bin"
    programs.mkdir(parents=True)
    for name, text in (("nohype", build), ("pytest", tests)):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    (folder / "tests").mkdir()
    for name in ("Makefile", "setup.cfg", "tests/run_all.py"):
        shutil.copyfile(source_tree() / name, folder / name)
    for name in ("installed", "browser"):
        (folder / "venv" / name).touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    process = subprocess.Popen(
        ["make", "-C", folder, "test", "VENV=venv"], env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_pid(file: Path) -> int:
    return int(file.read_text() or 0) if file.exists() else 0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


LAB = 'case "$*" in *"-m lab and not soak"*) {}; esac'
LOST_ONCE = "[ -e again ] || { touch again; exit 75; }"


@pytest.mark.parametrize(
    ("build", "tests", "status"),
    [
        ("exit 1", "exit 0", 0), ("exit 0", "exit 1", 2), ("exit 0", LAB.format("exit 1"), 2),
        ("exit 0", LAB.format("exit 75"), 2), ("exit 0", LAB.format(LOST_ONCE), 0),
        ("exit 0", LAB.format("exit 0") + "; exit 1", 2),
    ],
)  # fmt: skip
def test_only_a_failed_test_fails_make(tmp_path: Path, build: str, tests: str, status: int) -> None:
    with making(tmp_path, build, tests) as process:
        assert process.wait(60) == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_interrupted_make_ends_the_build(tmp_path: Path, number: signal.Signals) -> None:
    assert_ended(tmp_path, WAIT.format("build"), NAMES, number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_make_ends_the_image_that_is_built_beside_the_tests(tmp_path: Path, number: signal.Signals) -> None:
    build = f'case "$*" in image*) {WAIT.format("image")};; esac'
    assert_ended(tmp_path, build, ("image", "tests"), number)


def test_make_does_not_leave_an_image_that_is_still_being_built(tmp_path: Path) -> None:
    build = 'case "$*" in image*) sleep 1; touch built;; esac'
    with making(tmp_path, build, "exit 0") as process:
        assert process.wait(60) == 0
        assert (tmp_path / "built").exists()


def assert_ended(folder: Path, build: str, names: Iterable[str], number: signal.Signals) -> None:
    with making(folder, build, WAIT.format("tests")) as process:
        try:
            assert wait_until(lambda: all(read_pid(folder / f"{name}.pid") for name in names), timeout=60, interval=0.02)
            os.killpg(process.pid, number)
            assert process.wait(60)
            pids = [read_pid(folder / f"{name}.pid") for name in names]
            assert wait_until(lambda: not any(map(is_running, pids)), timeout=10, interval=0.02)
        finally:
            for name in names:
                if is_running(pid := read_pid(folder / f"{name}.pid")):
                    os.kill(pid, signal.SIGKILL)
