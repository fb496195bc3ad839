"""Style, types and spelling are tests like any other: one command checks everything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

TOOLS = {
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "mypy": ["-m", "mypy"],
    "codespell": ["-m", "codespell_lib", "."],
    "yamllint": ["-m", "yamllint", "--strict", "ansible", "examples", ".yamllint", "ansible/.ansible-lint"],
}


def run(*words: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def shell_scripts() -> list[Path]:
    """Files of the tree that begin with a line for a shell."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    paths = [ROOT / name for name in names if name]
    return [path for path in paths if path.is_file() and re.match(rb"#!.*\b(ba|da)?sh\b", path.read_bytes()[:80])]


@pytest.mark.parametrize("tool", TOOLS)
def test_linter(tool: str) -> None:
    run(sys.executable, *TOOLS[tool])


def test_shell_scripts() -> None:
    scripts = shell_scripts()
    assert ROOT / "guest-images/minimal/init" in scripts
    run(BIN / "shellcheck", *scripts)


def test_ansible_roles() -> None:
    run(sys.executable, "-m", "ansiblelint", "--offline", "-q", cwd=ROOT / "ansible")


def test_tests_of_the_lab_have_their_fixtures() -> None:
    """Few of them run before a release: a fixture that is missing would show in `make soak` only."""
    run(sys.executable, "-m", "pytest", "-n0", "--setup-plan", "-q", "-p", "no:cacheprovider", "tests/lab")
