"""Group commit: a change is answered after the fsync that covers it, and no answer rests on a failed one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import LedgerError, LostRace, OrchestratorError
from orchestrator.ledger import Claim, Ledger
from orchestrator.ledger.group_sync import GroupSync
from orchestrator.model.state import GuestState
from tests.unit.test_ledger import make_plan, make_request

GUESTS = 8


class Disk:
    """An fsync that waits until it is let go, and fails if it is told to."""

    def __init__(self) -> None:
        self.syncs, self.error = 0, None
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.error: Exception | None

    def sync(self) -> None:
        self.syncs += 1
        self.started.release()
        assert self.go.acquire(timeout=30)
        if self.error:
            raise self.error


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(GUESTS) as found:
        yield found


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_changes_that_wait_together_share_one_sync(pool: ThreadPoolExecutor) -> None:
    disk = Disk()
    group = GroupSync(disk.sync)
    first = pool.submit(group.wait, group.note_written())
    assert disk.started.acquire(timeout=30)
    rest = [pool.submit(group.wait, group.note_written()) for _ in range(GUESTS - 1)]
    disk.go.release()
    first.result(30)
    assert disk.started.acquire(timeout=30)
    assert not any(future.done() for future in rest), "the first sync began before they were written"
    disk.go.release()
    for future in rest:
        future.result(30)
    assert disk.syncs == 2
    group.wait(GUESTS)
    assert disk.syncs == 2, "what is on the disk needs no sync"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), LedgerError("the file is gone")])
def test_a_failed_sync_fails_all_that_it_covers(pool: ThreadPoolExecutor, error: Exception) -> None:
    disk = Disk()
    group = GroupSync(disk.sync)
    disk.error = error
    numbers = [group.note_written() for _ in range(GUESTS)]
    futures = [pool.submit(group.wait, number) for number in numbers]
    assert disk.started.acquire(timeout=30)
    disk.go.release(GUESTS)
    for future in futures:
        with pytest.raises(LedgerError, match="Input/output error|the file is gone"):
            future.result(30)


def test_after_an_io_error_no_later_sync_is_trusted() -> None:
    """The kernel has reported the error, and marked the pages clean: the next fsync would succeed without writing them."""
    disk = Disk()
    disk.go.release(10)
    group = GroupSync(disk.sync)
    lost = group.note_written()
    disk.error = OSError(5, "Input/output error")
    with pytest.raises(LedgerError, match="cannot sync the ledger: Input/output error"):
        group.wait(lost)
    disk.error = None
    for number in (lost, group.note_written()):
        with pytest.raises(LedgerError, match="cannot sync"):
            group.wait(number)
    assert disk.syncs == 1
    group.reset()
    group.wait(group.note_written())
    assert disk.syncs == 2


def test_a_sync_that_hangs_is_reported(pool: ThreadPoolExecutor) -> None:
    disk = Disk()
    group = GroupSync(disk.sync)
    future = pool.submit(group.wait, group.note_written())
    assert disk.started.acquire(timeout=30)
    group.raise_if_stalled(60)
    with pytest.raises(OrchestratorError, match="lock held for"):
        group.raise_if_stalled(0)
    disk.go.release()
    future.result(30)


def test_what_is_not_on_the_disk_fails_after_the_end(pool: ThreadPoolExecutor) -> None:
    disk = Disk()
    group = GroupSync(disk.sync)
    running = pool.submit(group.wait, group.note_written())
    assert disk.started.acquire(timeout=30)
    stopping = pool.submit(group.stop)
    assert not stopping.done()
    disk.go.release()
    running.result(30)
    stopping.result(30)
    with pytest.raises(LedgerError, match="closed"):
        group.wait(group.note_written())


# The same with the ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def claim(ledger: Ledger, number: int) -> Claim:
    """As the allocator: on what is known now, once more if it was too late."""
    plan = make_plan(number)
    while True:
        try:
            return ledger.claim(plan, ledger.read().generation, make_request(plan))
        except LostRace:
            continue


def start_together(pool: ThreadPoolExecutor, work: Callable[[int], Claim]) -> list[Future[Claim]]:
    return [pool.submit(work, number) for number in range(GUESTS)]


def test_many_claims_share_fsyncs(path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    with Ledger(path) as ledger:
        monkeypatch.setattr(os, "fdatasync", lambda _: disk.sync())
        futures = start_together(pool, lambda number: claim(ledger, number))
        assert disk.started.acquire(timeout=30)
        wait_for(lambda: len(ledger.read().claims) == GUESTS)
        assert not any(future.done() for future in futures), "none is answered before the disk has it"
        disk.go.release(GUESTS)
        assert {future.result(30).plan.name for future in futures} == {f"g{number}" for number in range(GUESTS)}
        assert disk.syncs <= 3


def test_a_failed_fsync_promises_nothing(path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(path) as ledger:
        with monkeypatch.context() as patch:

            def fail(_: int) -> None:
                wait_for(lambda: len(ledger.read().claims) == GUESTS)
                raise OSError(5, "Input/output error")

            patch.setattr(os, "fdatasync", fail)
            futures = start_together(pool, lambda number: claim(ledger, number))
            errors = [str(error) for future in futures if (error := future.exception(30))]
        # A claim that was written but waited for no sync yet is kept: the first change after the failure moves it to the file.
        kept = {future.result().plan.name for future in futures if not future.exception()}
        assert errors
        assert all("cannot sync the ledger: Input/output error" in error for error in errors)
        assert {found.plan.name for found in ledger.read().claims} == kept
        for number in range(GUESTS):
            if f"g{number}" not in kept:
                claim(ledger, number)
    with Ledger(path) as again:
        assert len(again.read().claims) == GUESTS


def test_a_state_is_not_answered_if_the_fsync_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(path) as ledger:
        claim(ledger, 1)

        def fail(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(LedgerError, match="cannot sync the ledger: No space left on device"):
                ledger.set_state("g1", GuestState.RUNNING)
        ledger.set_state("g1", GuestState.DELETING)
        ledger.release("g1")
