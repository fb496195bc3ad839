"""Workflows of examples/ci and docs/ci.md: their `nohype` commands parse, as the command line does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from orchestrator.cli.main import nohype

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "examples/ci").glob("*.yml")), ROOT / "docs/ci.md"]
_OPERATORS = {"&&", "||", ";", "|", ">"}


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def commands(file: Path) -> list[list[str]]:
    """The words after each `nohype`, of the program or of a checkout, at the start of a shell command."""
    text = file.read_text()
    texts = re.findall(r"^    (.*)$", text, re.MULTILINE) if file.suffix == ".md" else list(strings(yaml.safe_load(text)))
    found = []
    for line in (line for text in texts for line in text.replace("\\\n", " ").splitlines()):
        if not re.search(r"(^|[ /])nohype ", line):
            continue
        words = shlex.split(line)
        start = next(index for index, word in enumerate(words) if word.rpartition("/")[2] == "nohype")
        rest = words[start + 1 :]
        end = next((index for index, word in enumerate(rest) if word in _OPERATORS), len(rest))
        found.append(rest[:end])
    return found


def parse(words: list[str]) -> str:
    """The name of the command. Raises click.UsageError for what the program would not accept; runs nothing."""
    command: click.Command = nohype
    context = click.Context(nohype, info_name="nohype")
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no such command: {words[0]}")
        command, words = found, words[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    return command.make_context(command.name, list(words), parent=context.parent).command_path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_parse(file: Path) -> None:
    found = commands(file)
    assert found
    assert {parse(words).partition(" ")[2] for words in found} == {"lab run"}


@pytest.mark.parametrize(
    "line", ["lab run --pakage make -- true", "lab run --copy .", "lab run --timeout x y", "lab rum -- true", "labs run -- true"]
)
def test_wrong_command_does_not_parse(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line.split())
