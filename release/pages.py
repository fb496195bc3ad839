"""Writes the reference pages docs/cli.md, docs/configuration.md and docs/errors.md: `python -m release.pages`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator.client.problems import STATUS
from release.commands import Command, read_commands
from release.errors import ERRORS
from release.settings import Section, read_sections

DOCS = Path(__file__).parents[1] / "docs"
_NOTE = "This page is generated from {source} by `make references`. Do not edit it."
EXIT_STATUS = (
    ("0", "success"),
    ("1", "an error, or a failed proof"),
    ("2", "a usage error: nothing was requested"),
    ("3", "the lab was lost"),
    ("4 to 8", "evidence and `nohype doctor`: see the command"),
    ("124, 125, 129 to 143", "`nohype lab run`: see the command"),
    ("130", "interrupted"),
)


def build_pages() -> Mapping[str, str]:
    """The text of each page by its file name."""
    nohype, nohyped = read_commands()
    return {
        "cli.md": _join(_build_cli(nohype, nohyped)),
        "configuration.md": _join(_build_configuration(read_sections())),
        "errors.md": _join(_build_errors()),
    }


def _build_cli(nohype: Command, nohyped: Command) -> Iterator[str]:
    yield "# Commands"
    yield _NOTE.format(source="the commands' own `--help`") + " `man nohype` has the same text."
    yield from _build_command(nohype, 2)
    yield _table(("command", "purpose"), [(f"[{one.name}](#{_anchor(one.name)})", one.summary) for one in nohype.commands])
    yield "Exit status:"
    yield _table(("status", "meaning"), EXIT_STATUS)
    for group in nohype.commands:
        for command in group.walk():
            yield from _build_command(command, min(len(command.words), 3))
    yield from _build_command(nohyped, 2)


def _build_command(command: Command, level: int) -> Iterator[str]:
    yield f"{'#' * level} {command.name}"
    yield f"    {command.name} {command.usage}"
    for paragraph in command.paragraphs:
        yield _indent(paragraph) if "\n" in paragraph else paragraph
    if command.options:
        rows = [(f"`{name}`", text) for name, text in command.options if not name.endswith("--help")]
        if rows:
            yield _table(("option", "meaning"), rows)


def _build_configuration(sections: Sequence[Section]) -> Iterator[str]:
    yield "# Configuration"
    yield _NOTE.format(source="the models in `orchestrator/config.py`") + " `man nohype.toml` has the same text."
    yield (
        "The manager reads `/etc/nohype/nohype.toml` ([TOML](https://toml.io)) when it starts. The Ansible role `nohype_host`"
        " writes it. `nohype config check` checks a file, `nohype config check --host` compares it with the server. Restart the"
        " manager after a change: `systemctl restart nohyped`. Guests keep running."
    )
    yield "The smallest file:"
    yield '    [host]\n    housekeeping = "0-1"\n    uplinks = ["nic0"]'
    yield '`NAME` in a title is a name of your choice. Sizes are strings such as `"256M"`. A default of `-` means: not set.'
    for section in sections:
        yield f"## [{section.title}]"
        if section.text:
            yield section.text
        rows = [
            (f"`{one.name}`", one.kind, "required" if one.required else f"`{one.default}`" if one.default else "-", one.text)
            for one in section.settings
        ]
        if rows:
            yield _table(("field", "type", "default", "meaning"), rows)


def _build_errors() -> Iterator[str]:
    yield "# Errors"
    yield _NOTE.format(source="the error classes and `release/errors.py`")
    yield (
        "An error has a message (what failed, on what object, and what the kernel or the program reported) and usually a hint"
        " (what to do). The [HTTP API](api.md#errors) adds a code, which never changes its meaning. Errors without an HTTP status"
        " occur only in commands."
    )
    statuses = {code: str(int(STATUS[code])) if code in STATUS else "-" for code in ERRORS}
    rows = [(f"`{code}`", statuses[code], cause, remedy) for code, (cause, remedy) in ERRORS.items()]
    yield _table(("code", "HTTP status", "cause", "what to do"), rows)
    yield "See also [troubleshooting](troubleshooting.md) and [exit statuses](cli.md#nohype)."


def _anchor(title: str) -> str:
    """As GitHub builds it."""
    return title.lower().replace(" ", "-")


def _indent(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", r"\|")


def _join(blocks: Iterable[str]) -> str:
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    for name, text in build_pages().items():
        path = DOCS / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"{path.relative_to(DOCS.parent)}: written")


if __name__ == "__main__":
    main()
