"""Prints JSON for programs and aligned columns for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from orchestrator.values import Size

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def printable(text: str) -> str:
    """Escapes characters that a terminal would act on: the text may come from the network."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def say(text: str, *, nl: bool = True) -> None:
    """Prints text that a manager sent: any program may be listening at its address."""
    click.echo(printable(text), nl=nl)


def print_error(error: Exception) -> None:
    click.echo(f"nohype: {printable(str(error))}", err=True)


def print_os_error(error: OSError) -> None:
    """Of a file, or of the output that the command writes to."""
    click.echo(f"nohype: {printable(str(error.filename or 'output'))}: {error.strerror or error}", err=True)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """The first row is the heading."""
    texts = [[printable(str(cell)).replace("\n", r"\n") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    for row in texts:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def format_size(size: int) -> str:
    """Bytes as 256M."""
    return str(Size(size))
