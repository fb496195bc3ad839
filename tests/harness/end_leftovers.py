"""Ends the programs that a run of pytest has started, once the run has ended: also one that was killed, which cleans up nothing.

A program of its own: `end_leftovers.py PID MARK`, with the id of pytest and a value of `VARIABLE` that only its programs have.
They inherit it through new sessions and control groups, and after their parents have ended.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "NOHYPE_TEST_RUN"
_SECONDS = 30.0
"""For which programs are ended: each can start others meanwhile."""


_started: list[subprocess.Popen[bytes]] = []
"""So that they are not collected: they end after this process."""


def watch_this_process() -> None:
    """Starts the program for the process that calls this, and sets the variable."""
    mark = secrets.token_hex(16)
    words = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    # Not ended with pytest: ^C and `kill` of a process group reach a session.
    _started.append(
        subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True
        )
    )
    os.environ[VARIABLE] = mark


def is_marked(pid: int, mark: str) -> bool:
    try:
        return f"{VARIABLE}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def find_marked(mark: str) -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and is_marked(int(name), mark)]


def end(pid: int, mark: str) -> None:
    """Through a descriptor: another process may get the same id meanwhile."""
    with suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            if is_marked(pid, mark):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def main() -> None:
    parent, mark = int(sys.argv[1]), sys.argv[2]
    with suppress(ProcessLookupError):
        process = os.pidfd_open(parent)
        if os.getppid() == parent:  # otherwise it has ended already
            select.select([process], [], [])
    deadline = time.monotonic() + _SECONDS
    while (left := find_marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            end(pid, mark)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
