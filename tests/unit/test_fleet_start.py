"""The script that the controller runs before each start of a guest, without a controller: `scontrol` stores what it is given."""

import subprocess
import time
from pathlib import Path

import pytest

from orchestrator.fleet.configuration import build_start


def run_start(folder: Path, comment: str, seconds: int = 0, node: str = "host1") -> subprocess.CompletedProcess[str]:
    """Runs it as a child of a process that has just been started; ``seconds`` is the age that its parent must have."""
    state, script, scontrol = folder / "state", folder / "start", folder / "scontrol"
    state.mkdir(exist_ok=True)
    scontrol.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" > {folder}/asked\n")
    scontrol.chmod(0o755)
    text = build_start().replace("/var/lib/slurm/slurmctld", str(state)).replace("-lt 20 ]", f"-lt {seconds} ]")
    script.write_text(text.replace("PATH=", f"PATH={folder}:"))
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_COMMENT": comment, "SLURM_JOB_NODELIST": node}
    words = ["sh", "-c", f"sh {script}; exit $?"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_id_is_marked_and_refused_the_second_time(tmp_path: Path) -> None:
    assert run_start(tmp_path, "order-17").returncode == 0
    assert (tmp_path / "state/nohype-started/order-17").read_text() == "host1\n"
    again = run_start(tmp_path, "order-17\x1f2026-11-27T10:00:00Z started: guest web runs", node="host2")
    assert again.returncode == 1
    asked = (tmp_path / "asked").read_text()
    assert "refused: a guest with this id was already started on host1; the controller does not know that guest any more" in asked
    assert "was killed or the guest ended more than an hour ago; use another id" in asked
    assert (tmp_path / "state/nohype-started/order-17").read_text() == "host1\n"


@pytest.mark.parametrize("comment", ["", "../../etc/passwd", "..", ".hidden", "a/b", "two words", "-rf", "ümlaut", "*"])
def test_comment_that_does_not_begin_with_an_id_is_refused(tmp_path: Path, comment: str) -> None:
    assert run_start(tmp_path, comment).returncode == 1
    assert "does not begin with the id of a guest" in (tmp_path / "asked").read_text()
    assert [file for file in (tmp_path / "state").rglob("*") if file.is_file()] == []


def test_first_start_waits_until_the_controller_has_its_age(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert run_start(tmp_path, "early", seconds=2).returncode == 0
    assert time.monotonic() - begin > 0.9  # whole seconds of the clock and of the start


def test_id_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/nohype-started").write_text("not a folder")
    assert run_start(tmp_path, "order-17").returncode == 1
    assert "the controller cannot store that it starts the guest" in (tmp_path / "asked").read_text()
