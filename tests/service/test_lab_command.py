"""The server that runs `nohype` for the lab's tests gives the results of the program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.host.run import run
from tests.harness.lab_command import SERVER

PROGRAM = Path(sys.executable).with_name("nohype")


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["guest", "--help"],
        ["guest", "create"],
        ["no-such-command"],
        ["--socket", "/nonexistent/socket", "guest", "list"],
        ["guest", "list", "--socket", "/nonexistent/socket"],
        ["token", "create", "--role", "wrong"],
        [],
    ],
)
def test_command_of_the_server_gives_the_result_of_the_program(words: list[str]) -> None:
    expected = run([PROGRAM, *words], check=False)
    request = json.dumps(words).encode() + b"\n"
    done = subprocess.run([sys.executable, SERVER], input=request * 2, capture_output=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[expected.status, expected.stdout, expected.stderr]] * 2


@pytest.mark.parametrize(
    ("words", "status", "printed"),
    [
        (["-c", "import sys; print(*sys.argv)", "a b"], 0, "-c a b\n"),
        (["-c", "raise SystemExit(3)"], 3, ""),
        (["-c", "no python"], 1, ""),
    ],
)
def test_server_runs_python_programs(words: list[str], status: int, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, SERVER], input=json.dumps(words).encode(), capture_output=True, check=True, timeout=120
    )
    found, stdout, stderr = json.loads(done.stdout)
    assert (found, stdout, "SyntaxError" in stderr) == (status, printed, status == 1)
