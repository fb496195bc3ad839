"""Completion in real shells, of commands, options and the names that a served manager has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from orchestrator.cli.main import nohype
from tests.harness.api_server import Served, open_to_all, serve
from tests.harness.guests import create

BIN = Path(sys.executable).parent
SHELLS = ("bash", "zsh", "fish")

BASH = """
set -u
source <(nohype completion bash)
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMPREPLY=()
_nohype_completion nohype "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]+"${COMPREPLY[@]}"}"
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("completion")) as served:
        open_to_all(served.path)
        for name in ("web", "worker", "db"):
            create(served.manager, name=name)
        yield served


def complete(*words: str, socket: str = "/nonexistent") -> list[str]:
    """What bash offers for the last word."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NOHYPE_SOCKET": socket}
    argv = ["bash", "--norc", "-c", BASH, "bash", "nohype", *words]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_commands() -> None:
    assert complete("gu") == ["guest"]
    assert complete("guest", "st") == ["start", "stop"]
    assert complete("completion", "") == list(SHELLS)


def test_bash_completes_all_commands_without_importing_them() -> None:
    assert complete("") == nohype.list_commands(click.Context(nohype))


def test_bash_completes_options_and_their_values() -> None:
    assert "--memory" in complete("guest", "create", "web", "--me")
    assert complete("guest", "create", "web", "--restart", "") == ["never", "on-failure"]


def test_bash_completes_names_of_guests(served: Served) -> None:
    assert sorted(complete("guest", "show", "", socket=str(served.path))) == ["db", "web", "worker"]
    assert complete("guest", "stop", "we", socket=str(served.path)) == ["web"]
    assert complete("--socket", str(served.path), "exits", "d") == ["db"]


def test_without_a_manager_no_name_and_no_message() -> None:
    assert complete("guest", "show", "") == []
    assert complete("guest", "show", "", socket="") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_accepted_by_its_shell(shell: str, tmp_path: Path) -> None:
    script = CliRunner().invoke(nohype, ["completion", shell]).output
    assert "_NOHYPE_COMPLETE" in script
    path = tmp_path / "script"
    path.write_text(script)
    if shutil.which(shell):  # zsh and fish are not required for the other tests
        subprocess.run([shell, "-n", str(path)], check=True, timeout=60)
