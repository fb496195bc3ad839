"""Locks on files: one holder at a time, released with the descriptor, also when its holder removes the file; queues of calls."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from orchestrator.locks import CallQueue, lock_file


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


def start_calls(queue: CallQueue, count: int, done: list[tuple[int, str]]) -> list[threading.Thread]:
    """Calls that come one after the other, while the first one waits until all have come."""
    begun, arrived = threading.Event(), threading.Event()

    def call(number: int) -> None:
        def work() -> int:
            if not number:
                begun.set()
                assert arrived.wait(30)
            if number % 7 == 3:
                raise ValueError(number)
            done.append((number, threading.current_thread().name))
            return number

        if number % 7 == 3:
            with pytest.raises(ValueError, match=f"^{number}$"):
                queue.run(work)
            done.append((number, "raised"))
        else:
            assert queue.run(work) == number

    threads = [threading.Thread(target=call, args=(number,), name=str(number)) for number in range(count)]
    for number, thread in enumerate(threads):
        thread.start()
        assert begun.wait(30)
        while queue.count < number:
            time.sleep(0.001)
    arrived.set()
    return threads


def test_calls_run_in_the_order_in_which_they_came() -> None:
    """Each thread gets the result or error of its own call, whichever thread has run it."""
    queue, done = CallQueue(), list[tuple[int, str]]()
    for thread in start_calls(queue, 50, done):
        thread.join(30)
    returned = [number for number, thread in done if thread != "raised"]
    assert returned == [number for number in range(50) if number % 7 != 3]
    assert sorted(number for number, thread in done if thread == "raised") == [*range(3, 50, 7)]
    assert queue.run(lambda: "later") == "later"


def test_no_thread_runs_the_calls_of_others_without_end() -> None:
    queue, done = CallQueue(), list[tuple[int, str]]()
    for thread in start_calls(queue, 50, done):
        thread.join(30)
    counts = Counter(thread for _, thread in done if thread != "raised")
    assert len(counts) >= 3
    assert max(counts.values()) < 20


def test_calls_of_many_threads_never_overlap() -> None:
    queue, inside, results = CallQueue(), [0], list[int]()

    def work() -> int:
        inside[0] += 1
        assert inside == [1]
        time.sleep(0)
        inside[0] -= 1
        return 1

    def call() -> None:
        results.extend(queue.run(work) for _ in range(200))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(results) == 1600
