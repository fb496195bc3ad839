"""The commands of the program as values, read from its own parser: for man pages and docs/cli.md."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import click

from orchestrator.cli.main import nohype
from orchestrator.daemon.main import main as nohyped


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]  # as typed: ("nohype", "guest", "create")
    usage: str  # what follows the words: "[OPTIONS] NAME"
    paragraphs: tuple[str, ...]  # the first is one sentence
    options: tuple[tuple[str, str], ...]  # ("--memory SIZE", "Memory, ...")
    commands: tuple[Command, ...]

    @property
    def name(self) -> str:
        return " ".join(self.words)

    @property
    def summary(self) -> str:
        return self.paragraphs[0]

    def walk(self) -> Iterator[Command]:
        """This command, then all below it."""
        yield self
        for command in self.commands:
            yield from command.walk()


def read_commands() -> tuple[Command, Command]:
    """`nohype` and `nohyped`. The width of the terminal does not matter: no text is wrapped."""
    return _read(nohype, "nohype", None), _read(nohyped, "nohyped", None)


def _read(command: click.Command, word: str, parent: click.Context | None) -> Command:
    ctx = click.Context(command, info_name=word, parent=parent)
    below: tuple[Command, ...] = ()
    if isinstance(command, click.Group):
        found = ((name, command.get_command(ctx, name)) for name in command.list_commands(ctx))
        below = tuple(_read(one, name, ctx) for name, one in found if one is not None and not one.hidden)
    # Not of arguments: newer versions of click have records without text for them.
    records = (one.get_help_record(ctx) for one in command.get_params(ctx) if isinstance(one, click.Option))
    return Command(
        tuple(ctx.command_path.split()),
        " ".join(command.collect_usage_pieces(ctx)),
        _paragraphs(command.help or command.short_help or ""),
        tuple((name, " ".join(text.split())) for name, text in filter(None, records)),
        below,
    )


def _paragraphs(text: str) -> tuple[str, ...]:
    """Joined to one line each, unless click keeps their lines (those after a backspace character)."""
    blocks = inspect.cleandoc(text.partition("\f")[0]).split("\n\n")
    return tuple(block.removeprefix("\b\n") if block.startswith("\b") else " ".join(block.split()) for block in blocks)
