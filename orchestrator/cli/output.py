"""How results look: JSON for programs, aligned columns for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from orchestrator.values import Size

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def printable(text: str) -> str:
    """What could move a terminal's cursor, or turn text round, is shown as it would be written: it may come from the network."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in text)


def say(text: str, *, nl: bool = True) -> None:
    """Prints text of which parts come from a manager; any program may be listening in its place."""
    click.echo(printable(text), nl=nl)


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    click.echo(json.dumps(value, indent=2))


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """Prints rows as left-aligned columns; the first row is the heading."""
    texts = [[printable(str(cell)).replace("\n", r"\n") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    for row in texts:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def format_size(size: int) -> str:
    """Bytes as people read them: 256M."""
    return str(Size(size))
