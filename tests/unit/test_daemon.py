"""How the daemon's process ends when it cannot start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator import daemon
from orchestrator.errors import LedgerError

UNIT = Path(__file__).parents[2] / "ansible/roles/nohype_host/templates/nohyped.service.j2"


@pytest.fixture(autouse=True)
def _logging_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "set_up_reports", lambda: None)


def test_after_a_wrong_configuration_it_is_not_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "nohype.toml"
    file.write_text("[host")
    with pytest.raises(SystemExit) as ended:
        daemon.main(["--config", str(file)])
    assert ended.value.code == os.EX_CONFIG
    assert capsys.readouterr().err.startswith(f"nohyped: the configuration {file} is not TOML: ")
    assert f"\nRestartPreventExitStatus={os.EX_CONFIG}\n" in UNIT.read_text()


def test_after_other_trouble_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(daemon, "read_config", lambda _path: None)
    monkeypatch.setattr(daemon, "serve", fail)
    with pytest.raises(SystemExit) as ended:
        daemon.main([])
    assert ended.value.code == "nohyped: the disk is full"  # which makes Python print it and end with 1
