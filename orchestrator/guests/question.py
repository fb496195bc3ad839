"""A command that is typed on a guest's console, and its reply.

The reply is read from the console's log, not from the pty: QEMU detects only after a second that the pty was opened, and output
before that reaches only the log.
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

REPORT_READY = "report ready"

ABANDONED_SECONDS = 10.0
"""Seconds to wait for the reply after the client has gone: it must not be taken for the reply to the next command."""


class Question:
    """One command. The next command is typed when this one is over: replies do not name their command. ``pty`` is QEMU's."""

    def __init__(self, pty: Path, line: str, timeout: float) -> None:
        self.future: Future[str] = Future()
        self.timeout, self.deadline = timeout, time.monotonic() + timeout
        self._pty, self._line = pty, line
        self._descriptor: int | None = None
        self._output, self._omitted = b"", 0

    @property
    def was_typed(self) -> bool:
        return self._descriptor is not None

    def type(self) -> None:
        """Types the line, unless its client has gone. The pty stays open until the reply: QEMU does not read a closed pty."""
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
            why = f"cannot write to the guest's console {self._pty}: {error.strerror}"
            self._fail(GuestError(why, "QEMU is not reading it"))

    def feed(self, data: bytes, answer: Line | None) -> bool:
        """Takes new output, and the end of the reply if the output has it; returns whether it has."""
        self._drain()
        self._keep(data if answer is None else data[: answer.end])
        if answer is None:
            return False
        note = f"[{self._omitted} bytes before this are omitted]\n" if self._omitted else ""
        self._close()
        settle(self.future, note + clean(self._output))
        return True

    def is_over(self, now: float) -> bool:
        """Whether the next command can be typed."""
        if not self.future.done():
            return False
        if self.future.cancelled() and self.was_typed:
            self.deadline = min(self.deadline, now + ABANDONED_SECONDS)
            if now <= self.deadline:
                return False
        self._close()
        return True

    def expire(self, now: float, show: Callable[[], str]) -> None:
        """``show`` returns the end of the console, for a command that was not typed yet."""
        if now >= self.deadline and not self.future.done():
            what, output = self._describe(show)
            self._fail(GuestError(f"timed out after {self.timeout:g} s waiting for the guest to {what}; console output:{output}"))

    def end(self, show: Callable[[], str], error: OrchestratorError | None) -> None:
        if not error:
            what, output = self._describe(show)
            error = GuestError(f"the guest ended before it could {what}; console output:{output}")
        self._fail(error)

    def _describe(self, show: Callable[[], str]) -> tuple[str, str]:
        return (f"reply to {self._line!r}", format_tail(self._output)) if self.was_typed else (REPORT_READY, show())

    def _keep(self, data: bytes) -> None:
        self._output += data
        if len(self._output) > ANSWER_BYTES:
            # Starts at a line, if the part has a line break.
            start = self._output.find(b"\n", -ANSWER_BYTES) + 1
            start = start if 0 < start < len(self._output) else len(self._output) - ANSWER_BYTES
            self._omitted += start
            self._output = self._output[start:]

    def _drain(self) -> None:
        """Empties the pty, which holds 4 KB. QEMU retries output that does not fit (hw/char/serial.c, serial_xmit), then drops it
        or logs it several times (chardev/char.c, qemu_chr_write_buffer).
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
    """Does nothing if the client has cancelled the wait."""
    with suppress(InvalidStateError):
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)
