"""Reference pages and man pages have what the parsers, the models and the error classes have, and nothing is written by hand."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel, Field

from orchestrator.cli.main import nohype
from orchestrator.client.problems import STATUS
from orchestrator.config import DaemonConfig
from release.commands import read_commands
from release.errors import ERRORS, read_codes
from release.manpages import build_manpages, escape, write_manpages
from release.pages import DOCS, build_pages
from release.settings import read_comments, read_sections

DATE = 1_700_000_000


class Sample(BaseModel):
    # Above.
    above: int = Field(default=1)  # and behind
    behind: str = "#"  # only behind

    # Not of a field.

    bare: bool = False


def walk(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands that are not hidden, read from click directly."""
    yield words, command
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below
            if not below.hidden:
                yield from walk(below, (*words, name))


@pytest.mark.parametrize("name", build_pages())
def test_page_is_current(name: str) -> None:
    path, text = DOCS / name, build_pages()[name]
    if os.environ.get("REGENERATE"):
        path.write_text(text)
    assert path.read_text() == text, "run `make references`, and read the difference"


def test_every_command_and_option_is_in_both_references() -> None:
    page, manpages = build_pages()["cli.md"], build_manpages(DATE)
    for words, command in walk(nohype, ("nohype",)):
        manpage = manpages["-".join(words[:2]) + ".1"]
        assert f" {' '.join(words)}\n" in page
        assert escape(" ".join(words[1:])) in manpage
        for option in (one for one in command.params if isinstance(one, click.Option) and not one.hidden):
            assert option.opts[0] in page
            assert escape(option.opts[0]) in manpage


def test_every_setting_has_a_text() -> None:
    sections = read_sections()
    assert {section.title.partition(".")[0] for section in sections} == set(DaemonConfig.model_fields)
    without = [f"{section.title}.{one.name}" for section in sections for one in section.settings if not one.text]
    assert not without, "add a comment at the field: above it, or behind it"
    assert not [section.title for section in sections if not section.text]
    # TOML has no such word
    assert not [one.name for section in sections for one in section.settings if "None" in one.text + one.default]


def test_comments_of_a_field_are_those_above_and_behind() -> None:
    assert read_comments(Sample) == {"above": "Above. and behind.", "behind": "Only behind.", "bare": ""}


def test_every_error_has_cause_and_remedy() -> None:
    assert read_codes() == set(ERRORS)
    assert set(STATUS) <= set(ERRORS)
    for code, (cause, remedy) in ERRORS.items():
        assert cause, code
        assert remedy, code
        assert not cause.endswith("."), code
        assert not remedy.endswith("."), code


def test_manpages_have_no_fault(tmp_path: Path) -> None:
    paths = write_manpages(tmp_path, DATE)
    assert {path.parent.name for path in paths} == {"man1", "man5", "man8"}
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", *map(str, paths)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_fault_in_a_manpage_is_found(tmp_path: Path) -> None:
    page = tmp_path / "broken.1"
    page.write_text('.TH BROKEN 1 "2023-11-14"\n.SH NAME\nbroken\n.SH\n.nosuchrequest\n')
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", str(page)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode


def test_manpage_shows_the_words_of_the_help(tmp_path: Path) -> None:
    """Escapes are those of the formatter: options can be copied, and no line is taken as a request."""
    write_manpages(tmp_path, DATE)
    argv = ["mandoc", "-T", "utf8", "-O", "width=100", str(tmp_path / "man1" / "nohype-guest.1")]
    shown = re.sub(r".\x08", "", subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert "nohype guest create [OPTIONS] NAME" in shown
    for name, text in next(one for one in read_commands()[0].walk() if one.name == "nohype guest create").options:
        if not name.endswith("--help"):
            assert name in shown
            assert " ".join(text.split()[:4]) in " ".join(shown.split())


def test_same_date_gives_same_pages() -> None:
    assert build_manpages(DATE) == build_manpages(DATE)
    assert '"2023-11-14"' in build_manpages(DATE)["nohype.1"]
