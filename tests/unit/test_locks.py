"""Locks on files: one holder at a time, released with the descriptor, also when the file is removed by its holder."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from orchestrator.locks import lock_file


def test_second_holder_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BlockingIOError):
        lock_file(path)
    os.close(first)
    os.close(lock_file(path))


def test_refusal_leaves_no_descriptor_open(tmp_path: Path) -> None:
    first = lock_file(tmp_path / "lock")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(BlockingIOError):
            lock_file(tmp_path / "lock")
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(first)


def test_missing_file_is_not_created_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "lock", create=False)
    assert not (tmp_path / "lock").exists()


def test_waiting_ends_with_the_first_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path)
    threading.Timer(0.2, os.close, [first]).start()
    os.close(lock_file(path, wait=True))


def test_file_removed_before_the_lock_is_taken_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a removed file would exclude no other process."""
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def remove_first(descriptor: int, flags: int) -> None:
        flock(descriptor, flags)
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", remove_first)
    descriptor = lock_file(path)
    assert len(calls) == 2
    assert os.fstat(descriptor).st_ino == path.stat().st_ino
    os.close(descriptor)
    calls.clear()
    with pytest.raises(FileNotFoundError):
        lock_file(path, create=False)
