"""The pages for operators name messages, commands, checks and proofs that exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from orchestrator.audit.catalogue import PROOFS
from orchestrator.cli.main import nohype
from orchestrator.doctor.catalogue import CHECKS

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| symptom", "| proof that"))
]
CHECK_NAMES, PROOF_NAMES = {check.name for check in CHECKS}, {proof.name for proof in PROOFS}
NAMES = CHECK_NAMES | PROOF_NAMES
OTHER_PROGRAMS = ("dmesg", "cat", "python3")
FIELDS = ("use",)


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def find_command(words: list[str]) -> click.Command | None:
    """Of `nohype` by its names; the first word that is none ends them."""
    found: click.Command = nohype
    for word in words:
        if not isinstance(found, click.Group) or word.isupper() or word.startswith(("-", ".")):
            break
        command = found.get_command(click.Context(found), word)
        if command is None:
            return None
        found = command
    return None if isinstance(found, click.Group) else found


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_row_names_what_exists(row: list[str]) -> None:
    for text in quoted(row[1]):
        words = text.split()
        if words[0] == "nohype":
            assert find_command(words[1:]), f"{text} is not a command"
        else:
            assert words[0] in {*NAMES, *OTHER_PROGRAMS, *FIELDS}, f"{text} is neither a check nor a proof"


def test_messages_are_those_of_the_program() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "orchestrator").rglob("*.py"))
    literal = re.sub(r'"\s*\n?\s*f?"', "", sources)
    for symptom in (text for row in ROWS for text in quoted(row[0])):
        if symptom in PROOF_NAMES or symptom in ("POST", "create"):
            continue
        pattern = re.escape(symptom).replace("2M", r"\S+").replace(r"of\ N\ ", r"of\ \S+\ ").replace("\\ ", r"\s")
        assert re.search(pattern, literal), f"{symptom} is not a message"


def test_comparison_names_checks_and_its_sources_once() -> None:
    text = (ROOT / "docs/comparison.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    named = {name for row in rows for name in quoted(row[-1]) if re.fullmatch(r"[a-z]+(-[a-z]+)*", name)}
    assert CHECK_NAMES - named == {"cores", "disk-space"}
    assert named - CHECK_NAMES <= {"npt", "ept"}
    used = {int(number) for number in re.findall(r"\[(\d+)\](?!\()", text)}
    assert used == {int(number) for number in re.findall(r"^(\d+)\. \[", text, re.MULTILINE)}
