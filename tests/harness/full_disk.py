"""A manager whose ledger is on a disk that is full: a real one, a small tmpfs in a mount namespace of its own. Run as a program.

Its argument is an empty folder. It ends with an exception if something is not as it should be.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from orchestrator.daemon.monitoring import status_line
from orchestrator.errors import LedgerError
from orchestrator.guests.service import GuestService
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.request import GuestRequest
from tests.fakes.server import IMAGE
from tests.harness.crash import Tell, World, in_child

SIZE = 8 << 20
NAMES = ("g0", "g1", "g2", "g3", "g4", "g5")


class Disk:
    """The folder of the ledger, a file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._filler = folder, folder / "filler"

    def fill(self) -> None:
        """Takes what is left, to the last byte."""
        with open(self._filler, "ab", buffering=0) as file:
            for size in (1 << 16, 1):
                while _is_written(file, b"x" * size):
                    pass
        assert not os.statvfs(self.folder).f_bavail

    def free(self) -> None:
        self._filler.unlink()


def _is_written(file: FileIO, data: bytes) -> bool:
    try:
        return file.write(data) > 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return False
        raise


def open_manager(world: World, disk: Disk) -> tuple[GuestService, Ledger]:
    ledger = Ledger(disk.folder / "ledger.sqlite")
    folders = {"images": world.folder / "images", "consoles": world.folder / "consoles"}
    return GuestService(world.host, world.hypervisor, ledger, world.server.policy, **folders), ledger  # type: ignore[arg-type]


def refuse(work: Callable[[], object]) -> None:
    """It must say that the disk is full, and what to do."""
    with pytest.raises(LedgerError, match="full") as caught:
        work()
    assert "free some space" in caught.value.hint, caught.value


def request(name: str) -> GuestRequest:
    return GuestRequest(name=name, memory="64M", image=IMAGE)


def states(ledger: Ledger) -> dict[str, str]:
    return {claim.plan.name: str(claim.state) for claim in ledger.read().claims}


def end_guests(world: World, disk: Disk, tell: Tell) -> None:
    """A manager that meets a disk which has just become full."""
    manager, ledger = open_manager(world, disk)
    manager.reconciler.recover()
    for name in NAMES:
        manager.create(OPERATOR, request(name))
    manager.stop(OPERATOR, "g5", 0)
    disk.fill()
    refuse(lambda: manager.create(OPERATOR, request("new")))
    refuse(lambda: manager.start(OPERATOR, "g5"))
    refuse(lambda: ledger.append_event("cleared", "host", ""))
    manager.stop(OPERATOR, "g0", 5)
    disk.fill()  # other programs take what was released
    manager.kill(OPERATOR, "g1")
    disk.fill()
    manager.delete(OPERATOR, "g2")
    disk.fill()
    assert "is full" in status_line(ledger)
    for _ in range(300):
        # Repeated attempts to start something must not use up the reserve.
        refuse(lambda: manager.start(OPERATOR, "g0"))
        refuse(lambda: manager.create(OPERATOR, request("new")))
        refuse(lambda: ledger.add_undo_record("g0", "move", {}))
    disk.fill()
    manager.delete(OPERATOR, "g0")
    assert states(ledger) == {"g1": "stopped", "g3": "running", "g4": "running", "g5": "stopped"}
    tell(left=True)
    os.kill(os.getpid(), signal.SIGKILL)


def start_and_end(world: World, disk: Disk, name: str) -> None:
    """A manager that starts on a full disk, ends a guest, and is stopped."""
    disk.fill()
    manager, ledger = open_manager(world, disk)
    manager.reconciler.recover()
    refuse(lambda: manager.create(OPERATOR, request("new")))
    assert states(ledger)[name] == "running"
    manager.kill(OPERATOR, name)
    disk.fill()
    manager.close()
    ledger.close()
    # Only the reserve is left next to it.
    assert {file.name for file in disk.folder.iterdir()} <= {"ledger.sqlite", "ledger.sqlite.reserve", "filler"}


def go_on(world: World, disk: Disk) -> None:
    """There is space again."""
    disk.free()
    manager, ledger = open_manager(world, disk)
    manager.reconciler.recover()
    assert states(ledger) == {"g1": "stopped", "g3": "stopped", "g4": "stopped", "g5": "stopped"}
    for name in states(ledger):
        manager.start(OPERATOR, name)
    manager.create(OPERATOR, request("new"))
    assert "full" not in status_line(ledger)
    assert [event.kind for event in ledger.events(None, 1)] == ["started"]
    for name in states(ledger):
        manager.delete(OPERATOR, name)
    assert not world.hypervisor.running_names()
    assert (disk.folder / "ledger.sqlite.reserve").stat().st_size == 2 << 20
    disk.fill()
    refuse(lambda: manager.create(OPERATOR, request("last")))
    disk.free()
    manager.create(OPERATOR, request("last"))
    manager.delete(OPERATOR, "last")


def main(folder: Path) -> None:
    logging.disable()
    disk, world = Disk(folder / "disk"), World(folder / "world")
    before = world.host.tree()
    status, said = in_child(lambda tell: end_guests(world, disk, tell))
    assert (status, said) == (-signal.SIGKILL, '{"left": true}\n'), said
    for name in ("g3", "g4"):  # the first after a kill, the second after a stop
        status, said = in_child(lambda _, name=name: start_and_end(world, disk, name))
        assert status == 0, said
    status, said = in_child(lambda _: go_on(world, disk))
    assert status == 0, said
    assert world.host.tree() == before, "all was undone once, and nothing twice"
    # There is no reserve for a new one.
    (disk.folder / "other").mkdir()
    (disk.folder / "other/ledger.sqlite").touch()
    disk.fill()
    with pytest.raises(LedgerError) as caught:
        Ledger(disk.folder / "other/ledger.sqlite")
    assert "`df`" in caught.value.hint or "space" in caught.value.hint, caught.value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
