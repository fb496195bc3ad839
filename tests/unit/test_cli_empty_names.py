"""An empty word, as of a shell variable that is not set, is never the current directory or the only lab."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import lab
from orchestrator.cli.main import nohype
from orchestrator.errors import RequestError
from orchestrator.lab import control
from orchestrator.lab.paths import LabDir


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("lab run --copy= true", "--copy"),
        ("lab run --copy /tmp --output= true", "--output"),
        ("image list --store=", "--store"),
        ("image build minimal --output=", "--output"),
        ("image build minimal --recipes=", "--recipes"),
        ("image import x /disk.raw --output=", "--output"),
    ],
)
def test_empty_directory_is_a_usage_error(words: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "job_lab", lambda *_: pytest.fail("it starts a lab"))
    result = CliRunner().invoke(nohype, words.split())
    assert (result.exit_code, f"'{option}': the name is empty" in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    "words", [("down", ""), ("exec", "--lab", "", "true"), ("ssh", "--lab="), ("console", "--lab=")], ids=str
)
def test_empty_name_of_a_lab_is_not_the_only_lab(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "list_folders", lambda: (LabDir("mine", tmp_path),))
    monkeypatch.setattr(control, "down", lambda *_, **__: pytest.fail("it stops the lab"))
    result = CliRunner().invoke(nohype, ["lab", *words], standalone_mode=False)
    assert isinstance(result.exception, RequestError)
    assert "'' is not a lab name" in str(result.exception)
