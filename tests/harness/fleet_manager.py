"""The manager of a fake host of the fleet as a process of its own, which a test kills with SIGKILL and starts again.

The fake host and its hypervisor are files, and outlive the manager as real ones do.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from orchestrator.client import Client
from orchestrator.resources import disk
from orchestrator.waiting import wait_until
from tests.fakes.server import Server
from tests.harness.api_server import open_to_all, serve
from tests.harness.crash import World, arm

SERVER = Server(cores=8, nodes=2, vfs=4, pages=512, disks=2)
"""Two nodes: 3 and 4 cores for guests, with 4 VFs, 1 GiB and an NVMe controller each."""
_HELD = "wipes-held"
"""A file in the folder of the host while no disk is wiped."""
_KILL_SECONDS = 60
_KILLED = (-signal.SIGKILL, -signal.SIGUSR1)
"""Exit status; the second before the process has a handler."""
_SETTINGS: dict[str, Any] = {"host": {"housekeeping": "0-1", "uplinks": ["nic0", "nic1"]}}


class ManagerProcess:
    """The manager of the host in ``folder``. It ends when this process ends.

    Attributes:
        path: its socket, which exists under this path after each start.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self.path, self.world = path, World(folder / "world", SERVER)
        self._folder = folder
        self._process: Popen[str] | None = None

    @property
    def client(self) -> Client:
        return Client(self.path)

    def start(self, points: int = 0) -> bool:
        """Returns when the manager has recovered; False if it was killed before.

        Args:
            points: changes of the host or the ledger after which it kills itself; 0 for never.
        """
        words = [sys.executable, "-m", "tests.harness.fleet_manager", str(self._folder), str(self.path), str(points)]
        self._process = Popen(words, stdin=PIPE, stdout=PIPE, text=True)
        assert self._process.stdout
        is_ready = self._process.stdout.readline() == "ready\n"
        assert is_ready or self._process.wait() in _KILLED, f"the manager of {self._folder.name} did not start"
        return is_ready

    def has_ended(self) -> bool:
        """Whether it was killed at one of the points of `start`."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """Kills it between two changes of the fake host, which would stay half-done. Returns when it no longer exists."""
        assert self._process
        self._process.send_signal(signal.SIGUSR1)
        assert self._process.wait(_KILL_SECONDS) in _KILLED

    @contextmanager
    def holding_wipes(self) -> Iterator[None]:
        """Wiping a disk takes as long as the block."""
        held = self._folder / _HELD
        held.touch()
        try:
            yield
        finally:
            held.unlink()

    def read_end(self) -> str:
        """Where it killed itself; empty if it was killed by `kill`."""
        assert self._process
        with self._process as process:
            assert process.stdout
            return process.stdout.read().strip()

    def stop(self) -> None:
        """Waits for the end of the process."""
        if self._process and not self.has_ended():
            with self._process as process:
                assert process.stdin
                process.stdin.close()


def kill_this_process(world: World) -> None:
    with world.host.wait_between_changes():
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, path: Path, points: int) -> None:
    world = World(folder / "world", SERVER)
    signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=kill_this_process, args=[world]).start())
    disks = folder / "disks"
    disks.mkdir(exist_ok=True)
    erase = disk.scrub_controller

    def wait_and_erase(*words: Any) -> object:
        wait_until(lambda: not (folder / _HELD).exists(), timeout=600, interval=0.05)
        return erase(*words)

    disk.scrub_controller = wait_and_erase  # type: ignore[assignment]
    with serve(folder, _SETTINGS, world=world, policy=replace(SERVER.policy, disk_folder=str(disks))) as served:
        open_to_all(served.path)
        new = path.with_suffix(".new")
        new.hardlink_to(served.path)
        new.replace(path)
        print("ready", flush=True)
        if points:
            arm(world, points, lambda where: print(where, flush=True))
        sys.stdin.read()


if __name__ == "__main__":
    os.setpgid(0, 0)  # Ctrl-C in the terminal is for the test
    logging.disable(logging.WARNING)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
