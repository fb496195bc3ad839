"""A second manager is refused, naming the first; the lock of a killed manager is free."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.daemon.single_instance import acquire
from orchestrator.errors import HostError

HOLD = "import sys, time; from orchestrator.daemon.single_instance import acquire; from pathlib import Path\n"
HOLD += "held = acquire(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_the_second_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state" / "lock"
    first = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        with pytest.raises(HostError, match=f"another manager .pid {first.pid}. holds {path}"):
            acquire(path)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with acquire(path):
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(HostError, match=f"pid {os.getpid()}"):
            acquire(path)
    acquire(path).close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot open"):
        acquire(tmp_path / "file" / "lock")


def test_a_full_disk_keeps_no_manager_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock counts; the pid is unknown then."""
    path = tmp_path / "lock"

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        held = acquire(path)
    with held, pytest.raises(HostError, match="another manager .pid unknown. holds"):
        acquire(path)


def test_a_shorter_id_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("12345678901234567890\n")
    with acquire(path):
        assert path.read_text() == f"{os.getpid()}\n"
