"""A guest's serial console: what it printed, and asking it something.

Answers are read from the console's log, not from the pty: QEMU notices only after a second that somebody opened the pty, and what
the guest prints before that reaches the log alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import GuestError

READY = r"^nohype: ready .*$"
GET_READY = "say that it is ready"
ANSWER = r"^nohype: (done|error).*$"
# C0 and C1 controls but tab and line feed, and what changes the direction of text (Unicode 9, UAX 9 2).
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_POLL = 0.2
_ALIVE = 2.0


def read_console(log: Path) -> str:
    """All that the guest has printed since it was started; empty if the log is not there yet.

    Without what could move the cursor of whoever reads it, or turn his text round: a guest may print anything.
    """
    try:
        return _UNSAFE.sub("\ufffd", log.read_bytes().decode(errors="replace").replace("\r", ""))
    except FileNotFoundError:
        return ""


def wait_for(
    log: Path, pattern: str, what: str, *, since: int = 0, timeout: float, alive: Callable[[], bool] = lambda: True
) -> str:
    """Waits until the guest prints a whole line that matches.

    Args:
        pattern: regular expression, matched against lines.
        what: in words, what the guest does by printing it.
        since: position in the text of ``read_console`` from which to look.
        timeout: seconds.
        alive: whether the guest still runs; asked now and then, since waiting for a guest that has ended is no use.

    Returns:
        What was printed from ``since`` up to the end of the matching line.

    Raises:
        GuestError: nothing matched in time, or the guest has ended; with the last lines that were printed.
    """
    deadline, next_check = time.monotonic() + timeout, time.monotonic() + _ALIVE
    line = re.compile(pattern + r"\n", re.MULTILINE) if pattern.endswith("$") else re.compile(pattern)
    while True:
        text = read_console(log)
        # logd starts a new file when one is full: then all of it is new.
        start = since if since <= len(text) else 0
        if match := line.search(text, start):
            return text[start : match.end()]
        now = time.monotonic()
        if now > deadline:
            raise GuestError(f"the guest did not {what} within {timeout:g} s; its console shows:{_tail(text[start:])}")
        if now > next_check:
            if not alive():
                raise GuestError(f"the guest has ended before it could {what}; its console shows:{_tail(text[start:])}")
            next_check = now + _ALIVE
        time.sleep(_POLL)


def _tail(text: str) -> str:
    return "".join(f"\n    {line}" for line in text.splitlines()[-8:]) or " nothing"


def tell(console: Path, log: Path, line: str, *, until: str = ANSWER, timeout: float) -> str:
    """Types a line on the guest's console once it is ready, and waits for the answer.

    Args:
        console: the pty of the guest's serial port.
        log: the console's log.
        line: what to type, without the line's end.

    Returns:
        What the guest printed, up to the end of the line that matches ``until``.

    Raises:
        GuestError: no pty, or no answer in time.
    """
    try:
        pty = os.open(console, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise GuestError(f"cannot open the guest's console {console}: {error.strerror}") from None
    try:
        # Before, nobody reads what is typed. Of a guest that has printed so much that logd has put it aside, it is not known any
        # more that it was ready: it has run for long.
        if not log.with_name(f"{log.name}.0").exists():
            wait_for(log, READY, GET_READY, timeout=timeout)
        since = len(read_console(log))
        try:
            os.write(pty, line.encode() + b"\n")
        except OSError as error:
            raise GuestError(f"cannot type on the guest's console {console}: {error.strerror}", "QEMU does not read it") from None
        return wait_for(log, until, f"answer {line!r}", since=since, timeout=timeout)
    finally:
        os.close(pty)
