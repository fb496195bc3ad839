"""The tutorial's commands are run as they stand in docs/tutorial.md, and answer as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lab.conftest import LabHost

TUTORIAL = Path(__file__).parents[2] / "docs/tutorial.md"
PROMPT = "    lab# "
WAITS = "nohype: the manager has not responded yet, still waiting: check `systemctl status nohyped` on its host\n"
# What differs from run to run: numbers, hexadecimal digits of addresses, and the width of columns.
VARIES = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}|[0-9]+(\.[0-9]+)?")


def read_steps(text: str) -> list[tuple[str, list[str]]]:
    """The commands with the lines that are shown below each."""
    steps: list[tuple[str, list[str]]] = []
    shown = False
    for line in text.splitlines():
        if line.startswith(PROMPT):
            steps.append((line.removeprefix(PROMPT), []))
            shown = True
        elif shown and line.startswith("    "):
            steps[-1][1].append(line.strip())
        else:
            shown = False
    return steps


def matches(said: str, shown: list[str]) -> bool:
    """Whether an answer is as shown, where a line `...` stands for any number of lines."""
    pattern = "".join(r"(?:[^\n]*\n)*?" if line == "..." else simplify(line) + r"\n" for line in shown)
    lines = "".join(f"{line.strip()}\n" for line in said.splitlines() if line.strip())
    return re.fullmatch(pattern, lines) is not None


def simplify(line: str) -> str:
    words = (VARIES.sub("\0", word) for word in line.split())
    return r"\s+".join(re.escape(word).replace("\0", r"[0-9a-f.:]+") for word in words)


@pytest.mark.soak
def test_commands_answer_as_shown(host: LabHost) -> None:
    steps = read_steps(TUTORIAL.read_text())
    assert len(steps) > 15
    with host.changed("true", "echo 0 > /sys/kernel/mm/ksm/run; nohype guest delete web; nohype guest delete db; true"):
        follow(host, steps)


def follow(host: LabHost, steps: list[tuple[str, list[str]]]) -> None:
    for command, shown in steps:
        done = host.run(command, check=False)
        said = done.stdout + done.stderr.replace(WAITS, "")  # of a slow lab, while the manager starts
        assert matches(said, shown), f"{command}\n{said}\nthe tutorial shows:\n" + "\n".join(shown)
