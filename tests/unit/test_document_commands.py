"""Commands in code blocks of the documents can be typed: command, options and number of arguments are those of the parser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from orchestrator.cli.main import nohype

ROOT = Path(__file__).parents[2]
# docs/cli.md is generated from the parser.
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"))
    if path.name not in ("cli.md", "CHANGELOG.md")
]
# What stands before a command: a prompt, a folder, sudo, and the command that runs another one in the lab.
BEFORE = re.compile(r"^(?:\$ |# |lab# )?(?:sudo )?(?:lab )?(?:\S*/)?nohype (?:lab exec (?:--lab \w+ )?-- nohype )?(?=[a-z-])")
END = ("|", "||", "&&", ";", ">", ">>", "<", "&")


def read_commands(text: str) -> list[list[str]]:
    """Words after `nohype`, of each line of a block. Lines that continue, or leave words out, are joined or cut there."""
    blocks = re.findall(r"(?:^(?: {4}|\t).*\n)+|^```\w*\n(?:.*\n)*?```", text.replace("\\\n", " "), re.MULTILINE)
    commands = []
    for line in (line.strip() for block in blocks for line in block.splitlines()):
        if found := BEFORE.match(line):
            try:
                words = shlex.split(line[found.end() :], comments=True)
            except ValueError:  # a quotation of several lines
                continue
            # "[" begins what can be left out in a usage line
            ends = [index for index, word in enumerate(words) if word in END or word.startswith("[")]
            commands.append(words[: min(ends, default=len(words))])
    return commands


def check(words: list[str]) -> None:
    """Raises click.UsageError."""
    command: click.Command = nohype
    ctx = click.Context(nohype, info_name="nohype")
    while isinstance(command, click.Group):
        _, words, _ = command.make_parser(ctx).parse_args(list(words))
        name, command, words = command.resolve_command(ctx, words) if words else ("", nohype, [])
        if command is nohype:  # only options, such as --version
            return
        assert command
        ctx = click.Context(command, info_name=name, parent=ctx, **command.context_settings)
    if "..." in words:
        return
    values, rest, _ = command.make_parser(ctx).parse_args(words)
    if rest:
        raise click.UsageError(f"unexpected {rest}")
    for parameter in command.params:
        if (
            isinstance(parameter, click.Argument)
            and parameter.required
            and not isinstance(values.get(parameter.name or ""), str | tuple)
        ):
            raise click.UsageError(f"missing {parameter.name}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_a_document_can_be_typed(path: Path) -> None:
    wrong = []
    for words in read_commands(path.read_text()):
        try:
            check(words)
        except click.UsageError as error:
            wrong.append(f"nohype {shlex.join(words)}: {error.format_message()}")
    assert not wrong


def test_commands_are_found() -> None:
    text = (
        "\n    $ lab nohype guest list\n    .venv/bin/nohype lab exec -- nohype who 2  # a CPU\n    nohype audit --json | jq .\n"
    )
    assert read_commands(text) == [["guest", "list"], ["who", "2"], ["audit", "--json"]]
    assert len([words for path in DOCUMENTS for words in read_commands(path.read_text())]) > 100


@pytest.mark.parametrize("line", ["guest creat web", "guest create web --memroy 1G", "guest show", "guest show web db"])
def test_command_that_cannot_be_typed_is_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        check(line.split())
