"""A line that is typed on a guest's console, and its answer.

The answer is read from the console's log, not from the pty: QEMU notices only after a second that the pty was opened, and what
the guest prints before that reaches the log alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path

from orchestrator.console import ANSWER_BYTES, Line, clean, format_tail
from orchestrator.errors import GuestError, OrchestratorError

GET_READY = "say that it is ready"

_ABANDONED = 10.0
"""Seconds for which the answer is still waited for when the client has gone: it must not be taken for that to the next line."""


class Question:
    """One question. The next is typed when this one is answered or over: answers do not say which line they answer.

    Args:
        pty: QEMU's end of the guest's serial port.
        line: what to type, without the line's end.
        timeout: seconds, from now on.
    """

    def __init__(self, pty: Path, line: str, timeout: float) -> None:
        self.future: Future[str] = Future()
        self.timeout, self.deadline = timeout, time.monotonic() + timeout
        self._pty, self._line = pty, line
        self._descriptor: int | None = None
        self._said, self._left_out = b"", 0

    @property
    def was_typed(self) -> bool:
        """Whether it is the one that waits for its answer."""
        return self._descriptor is not None

    def type(self) -> None:
        """Types the line, unless its client has gone. The pty stays open until the answer: QEMU does not read a closed one."""
        if self.future.done():
            return
        try:
            self._descriptor = os.open(self._pty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._fail(GuestError(f"cannot open the guest's console {self._pty}: {error.strerror}"))
            return
        try:
            os.write(self._descriptor, self._line.encode() + b"\n")
        except OSError as error:
            why = f"cannot type on the guest's console {self._pty}: {error.strerror}"
            self._fail(GuestError(why, "QEMU does not read it"))

    def hear(self, data: bytes, answer: Line | None) -> bool:
        """Takes what the guest has printed since, and the answer if that is in it; returns whether it is."""
        self._drain()
        self._keep(data if answer is None else data[: answer.end])
        if answer is None:
            return False
        note = f"[{self._left_out} bytes before this are left out]\n" if self._left_out else ""
        self._close()
        settle(self.future, note + clean(self._said))
        return True

    def is_over(self, now: float) -> bool:
        """Whether it keeps the next from being typed no longer."""
        if not self.future.done():
            return False
        if self.future.cancelled() and self.was_typed:
            self.deadline = min(self.deadline, now + _ABANDONED)
            if now <= self.deadline:
                return False
        self._close()
        return True

    def expire(self, now: float, show: Callable[[], str]) -> None:
        """Tells the client if its time is up; ``show`` gives the end of the console as it is shown before anything was typed."""
        if now >= self.deadline and not self.future.done():
            what, said = self._describe(show)
            self._fail(GuestError(f"the guest did not {what} within {self.timeout:g} s; its console shows:{said}"))

    def end(self, show: Callable[[], str], error: OrchestratorError | None) -> None:
        """Tells the client that the guest has ended, or the reason that is given."""
        if not error:
            what, said = self._describe(show)
            error = GuestError(f"the guest has ended before it could {what}; its console shows:{said}")
        self._fail(error)

    def _describe(self, show: Callable[[], str]) -> tuple[str, str]:
        return (f"answer {self._line!r}", format_tail(self._said)) if self.was_typed else (GET_READY, show())

    def _keep(self, data: bytes) -> None:
        self._said += data
        if len(self._said) > ANSWER_BYTES:
            # From the begin of a line on, if there is one.
            begin = self._said.find(b"\n", -ANSWER_BYTES) + 1
            begin = begin if 0 < begin < len(self._said) else len(self._said) - ANSWER_BYTES
            self._left_out += begin
            self._said = self._said[begin:]

    def _drain(self) -> None:
        """Takes what the guest prints out of the pty, which holds 4 KB: what there is no room for QEMU tries to write a few times
        (hw/char/serial.c, serial_xmit), and drops it then or has it several times in the log (chardev/char.c,
        qemu_chr_write_buffer).
        """
        with suppress(BlockingIOError, OSError):
            if self._descriptor is not None:
                os.read(self._descriptor, 1 << 16)

    def _fail(self, error: OrchestratorError) -> None:
        self._close()
        settle(self.future, error=error)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def settle(future: Future[str], result: str = "", error: OrchestratorError | None = None) -> None:
    """Ends a wait, if its client has not given it up meanwhile."""
    with suppress(InvalidStateError):
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)
