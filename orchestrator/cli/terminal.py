"""The terminal of the command: raw mode that is always left again, and its size."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def raw_terminal(descriptor: int) -> Iterator[None]:
    """Passes keys on as they are typed. The former mode is restored at the end, also after a signal and while suspended.

    For the main thread.
    """
    saved = termios.tcgetattr(descriptor)

    def restore() -> None:
        with suppress(termios.error):  # the terminal was closed
            # Not TCSAFLUSH, which waits until the terminal has shown all output. Keys that are not read yet were meant for the
            # guest: the shell must not execute them.
            termios.tcflush(descriptor, termios.TCIFLUSH)
            termios.tcsetattr(descriptor, termios.TCSANOW, saved)

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def suspend(number: int, _frame: FrameType | None) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # returns when the process continues
        signal.signal(number, suspend)
        tty.setraw(descriptor, termios.TCSANOW)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in _ENDING:
            before[number] = signal.signal(number, end)
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, suspend)
        tty.setraw(descriptor, termios.TCSANOW)
        yield
    finally:
        restore()
        for number, handler in before.items():
            signal.signal(number, handler)


def read_size(descriptor: int) -> tuple[int, int]:
    """Columns and rows; 80 and 24 if the terminal does not report them."""
    with suppress(OSError):
        size = os.get_terminal_size(descriptor)
        if size.columns and size.lines:
            return size.columns, size.lines
    return 80, 24
