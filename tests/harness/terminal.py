"""Runs the command `nohype` on a terminal of its own."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PROGRAM = "from orchestrator.cli.main import main; main()"
COMMAND = (sys.executable, "-c", _PROGRAM)


class Terminal:
    """A command and the terminal that it runs on.

    Attributes:
        shown: what the terminal has shown so far.
        before: the mode of the terminal before the command ran.
    """

    def __init__(self, *words: str, size: tuple[int, int] = (80, 24), **environment: str) -> None:
        self._ours, self._theirs = os.openpty()
        termios.tcsetwinsize(self._ours, (size[1], size[0]))
        self.before = self.mode
        self.shown = b""
        self._changed = threading.Condition()
        # A process group of its own, in the session of the tests: it can be suspended.
        self.process = subprocess.Popen(
            [*COMMAND, *words], stdin=self._theirs, stdout=self._theirs, stderr=self._theirs, process_group=0,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def mode(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    @property
    def is_raw(self) -> bool:
        local = self.mode[3]
        assert isinstance(local, int)
        return not local & (termios.ICANON | termios.ECHO | termios.ISIG)

    def resize(self, columns: int, rows: int) -> None:
        termios.tcsetwinsize(self._ours, (rows, columns))

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def until(self, text: bytes, seconds: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.shown, seconds), self.shown

    def wait(self, seconds: float = 60) -> int:
        """The exit status, when all output was shown."""
        status = self.process.wait(seconds)
        while select.select([self._ours], [], [], 0.2)[0]:
            pass
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._theirs)
        self._reader.join(10)
        os.close(self._ours)

    def _read(self) -> None:
        with suppress(OSError):  # the last user of the other side has closed it
            while data := os.read(self._ours, 4096):
                with self._changed:
                    self.shown += data
                    self._changed.notify_all()


@contextmanager
def run_on_terminal(*words: str, size: tuple[int, int] = (80, 24), **environment: str) -> Iterator[Terminal]:
    terminal = Terminal(*words, size=size, **environment)
    try:
        yield terminal
    finally:
        terminal.close()
