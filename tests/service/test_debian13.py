"""`make setup`, the command and the quick tests on Debian 13, in a root file system of it on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.harness.debian13 import Debian13, build_debian13
from tests.harness.large_folder import large_folder

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="builds a root file system"),
]


@pytest.fixture(scope="module")
def installed() -> Iterator[Debian13]:
    with large_folder("debian13") as folder:
        place = build_debian13(folder)
        done = place.run("make setup", timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        yield place


def test_interpreter_and_libvirt_are_those_of_debian_13(installed: Debian13) -> None:
    program = "import sys, libvirt; print(*sys.version_info[:2], libvirt.getVersion() // 1_000_000)"
    done = installed.run(f".venv/bin/python -c '{program}'", timeout=60)
    assert done.stdout == "3 13 11\n", done.stderr


@pytest.mark.parametrize("words", ["--version", "lab run --help", "demo --help", "doctor --json", "lab status"])
def test_commands_run_without_warnings_of_this_package(installed: Debian13, words: str) -> None:
    done = installed.run(f".venv/bin/python -W default .venv/bin/nohype {words}", timeout=120)
    assert done.returncode in ((0, 1, 3) if "doctor" in words else (0,)), done.stderr
    assert done.stdout
    assert "/orchestrator/" not in done.stderr


def test_quick_tests_pass(installed: Debian13) -> None:
    """Without the linters, whose result does not depend on the release."""
    options = "-q -n 2 -p no:cacheprovider -m 'not soak' --ignore tests/unit/test_linters.py"
    done = installed.run(f".venv/bin/pytest {options} tests/unit", timeout=3000)
    assert done.returncode == 0, done.stdout[-5000:]
