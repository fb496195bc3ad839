"""The ledger's files while it is open: deleted, replaced, closed; and the space that is kept for a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import LedgerError
from orchestrator.ledger import Ledger
from orchestrator.ledger.database import FSYNC, Database
from orchestrator.ledger.reserve import Reserve
from orchestrator.model.state import GuestState
from tests.unit.test_ledger import claim

SIZE, PART = 2 << 20, 512 << 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as opened:
        claim(opened, 1)
        opened.set_state("g1", GuestState.RUNNING)
        yield opened


def delete(path: Path) -> None:
    path.rename(path.with_name("away"))


def delete_wal(path: Path) -> None:
    delete(path.with_name(f"{path.name}-wal"))


def replace(path: Path) -> None:
    delete(path)
    shutil.copy(path.with_name("away"), path)


def replace_wal(path: Path) -> None:
    replace(path.with_name(f"{path.name}-wal"))


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


CHANGES: dict[str, Callable[[Ledger], object]] = {
    "claim": lambda ledger: claim(ledger, 2),
    "state": lambda ledger: ledger.set_state("g1", GuestState.STOPPING),
    "quarantine": lambda ledger: ledger.quarantine("g1", ["why"]),
    "release": lambda ledger: ledger.release("g1"),
    "record": lambda ledger: ledger.add_undo_record("g1", "move", {}),
    "forget": lambda ledger: ledger.drop_undo_record(1),
    "log": lambda ledger: ledger.append_event("cleared", "g1", ""),
}


@pytest.mark.parametrize("remove", [delete, delete_wal, replace, replace_wal, move_folder])
@pytest.mark.parametrize("change", CHANGES)
def test_change_is_refused_when_the_file_is_gone(ledger: Ledger, path: Path, remove: Callable[[Path], None], change: str) -> None:
    """What is written to it would be lost with the process. Once it is back, all goes on."""
    before = ledger.read()
    remove(path)
    with pytest.raises(LedgerError, match="was deleted or replaced while the manager had it open") as caught:
        CHANGES[change](ledger)
    assert "restore the ledger from a copy" in caught.value.hint
    assert ledger.read() == before
    assert "is gone or another file" in ledger.trouble
    if remove is move_folder:
        path.parent.with_name("elsewhere").rename(path.parent)
    else:
        away = path.with_name("away")
        away.replace(path if remove in (delete, replace) else path.with_name(f"{path.name}-wal"))
    assert ledger.trouble == ""
    claim(ledger, 3)
    ledger.close()
    with Ledger(path) as again:
        assert [one.plan.name for one in again.read().claims] == ["g1", "g3"]


@pytest.mark.parametrize(("moment", "known"), [("COMMIT", ["g1"]), (FSYNC, ["g1", "g2"])])
def test_claim_is_not_announced_when_the_file_disappears(path: Path, moment: str, known: list[str]) -> None:
    """After the commit it cannot be taken back: what it has is withheld from others until the file is back."""

    def trace(statement: str) -> None:
        if statement == moment and ledger.find(known[-1]):
            delete(path)

    with Ledger(path, trace=trace) as ledger:
        claim(ledger, 1)
        with pytest.raises(LedgerError, match="was deleted or replaced"):
            claim(ledger, 2)
        assert [one.plan.name for one in ledger.read().claims] == known


def test_replaced_file_is_not_changed_by_close(ledger: Ledger, path: Path) -> None:
    """An operator has put another one there."""
    wal = path.with_name(f"{path.name}-wal")
    replace(path)
    wal.rename(path.with_name("away-wal"))
    wal.write_bytes(b"another's")
    before = path.read_bytes()
    ledger.close()
    assert (path.read_bytes(), wal.read_bytes()) == (before, b"another's")


def test_closed_ledger_is_one_file(ledger: Ledger, path: Path, tmp_path: Path) -> None:
    ledger.append_event("cleared", "g1", "last words")
    assert path.with_name(f"{path.name}-wal").stat().st_size
    ledger.close()
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.reserve"}
    with Ledger(Path(shutil.copy(path, tmp_path / "copy.sqlite"))) as copy:
        assert [one.plan.name for one in copy.read().claims] == ["g1"]
        assert copy.events(None, 1)[0].detail == "last words"


def test_closed_ledger_refuses_calls(ledger: Ledger) -> None:
    """A thread that still works when the manager ends: it changes nothing any more."""
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed database"):
        ledger.add_undo_record("g1", "move", {})


# The reserve


@pytest.fixture
def reserve(tmp_path: Path) -> Reserve:
    made = Reserve(tmp_path / "reserve")
    assert made.restore()
    return made


def test_reserve_allocates_disk_space_and_releases_it_in_parts(reserve: Reserve, tmp_path: Path) -> None:
    file = tmp_path / "reserve"
    assert (file.stat().st_size, file.stat().st_mode & 0o777) == (SIZE, 0o600)
    assert file.stat().st_blocks * 512 >= SIZE, "no hole"
    for left in (3, 2, 1, 0):
        assert reserve.release()
        assert reserve.used
        assert file.stat().st_size == left * PART
    assert not reserve.release()
    assert reserve.restore()
    assert not reserve.used
    assert file.stat().st_size == SIZE


@pytest.mark.parametrize(("number", "used"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False)])
def test_reserve_without_disk_space_is_empty(
    reserve: Reserve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, used: bool
) -> None:
    """A full disk is told from a file system that can't keep any."""
    reserve.release()

    def fail(descriptor: int, *_: int) -> None:
        os.ftruncate(descriptor, SIZE - 1)  # half done
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert reserve.restore() is not used
    assert reserve.used is used
    assert (tmp_path / "reserve").stat().st_size == SIZE - PART, "what was had of it is given back"


class Full(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_FULL


class Busy(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_BUSY


def test_full_disk_releases_the_reserve_in_parts(path: Path) -> None:
    database = Database(path, lambda _: None)
    spare = path.with_name(f"{path.name}.reserve")

    def fail_until(left: int) -> Callable[[], str]:
        def work() -> str:
            if spare.stat().st_size > left:
                raise Full("full")
            return "done"

        return work

    def fail(*_: object) -> None:
        raise Busy("busy")

    with pytest.raises(Busy):
        database.with_reserve(fail)
    assert spare.stat().st_size == SIZE, "only for want of space"
    assert database.with_reserve(fail_until(2 * PART)) == "done"
    assert spare.stat().st_size == 2 * PART
    with pytest.raises(Full):
        database.with_reserve(fail_until(-1))
    assert spare.stat().st_size == 0
    database.close()


def test_reserve_is_used_for_the_end_of_guests(ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else has it; `full_disk` shows that on a real disk."""
    ledger.close()
    spare = path.with_name(f"{path.name}.reserve")
    spare.unlink()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        full = Ledger(path)
        for begin in ("claim", "record", "log"):
            with pytest.raises(LedgerError, match="its disk is full, and the reserve is for ending guests only"):
                CHANGES[begin](full)
        full.set_state("g1", GuestState.DELETING)
        with pytest.raises(LedgerError, match="disk is full"):
            full.add_undo_record("g1", "move", {})
        full.release("g1")
        assert "is full" in full.trouble
    claim(full, 2)
    assert full.trouble == ""
    assert spare.stat().st_size == SIZE
    full.close()
