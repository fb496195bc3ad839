"""Runs all tests but the long ones: those of the lab beside the others, as the lab waits for its guests half of the time.

    tests/run_all.py PYTEST NOHYPE

The output of the lab's tests is in build/lab-tests.log, and is shown when the others have ended. Exits with 1 if a test failed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

LOG = Path("build/lab-tests.log")
LAB_LOST = 75
"""Exit status of the lab's tests if the emulated server was lost, which says nothing about the tests: once more, in a new one."""
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_END_SECONDS, _POLL_SECONDS = 60, 0.5
_NICE = 10
"""Of the others: the lab's tests take longer, and would have the machine to themselves at the end, and half of it idle."""


class _Interrupted(BaseException):
    """By SIGHUP, SIGINT or SIGTERM. `subprocess` treats KeyboardInterrupt in its own way."""


def main() -> int:
    pytest, nohype = sys.argv[1:]
    LOG.parent.mkdir(exist_ok=True)
    lab = f"""
        {nohype} lab build && {{ env --default-signal=INT {nohype} image build debian --output build/images & }}
        set -- {pytest} -m 'lab and not soak' --durations=30 --durations-min=1 tests
        "$@"; status=$?
        [ $status != {LAB_LOST} ] || {{ "$@"; status=$?; }}
        wait
        exit $status
    """
    # The image is built beside the first tests, and a shell lets such programs ignore SIGINT. If a build fails, the lab's tests
    # build again and show the error.
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    with LOG.open("w") as log:
        beside = subprocess.Popen(
            ["sh", "-c", lab], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            others = subprocess.Popen(
                ["nice", "-n", str(_NICE), pytest, "-n", "2", "-m", "not lab and not soak", "tests"], start_new_session=True
            )
            # The kernel may weigh sessions, not processes (sched(7), autogroup).
            with suppress(OSError):
                Path(f"/proc/{others.pid}/autogroup").write_text(str(_NICE))
            try:
                failed = others.wait()
            except _Interrupted:
                _end(others)
                raise
            _follow(beside)
        except _Interrupted:
            _end(beside)
            return 130
    return int(bool(failed or beside.returncode))


def _follow(process: subprocess.Popen[bytes]) -> None:
    """Prints the log until the process has ended."""
    with LOG.open(errors="replace") as log:
        ended = False
        while not ended:
            ended = process.poll() is not None
            print(log.read(), end="", flush=True)
            time.sleep(0 if ended else _POLL_SECONDS)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # make passes on a signal that a whole process group has got already
    raise _Interrupted


def _end(process: subprocess.Popen[bytes]) -> None:
    """By the signal of Ctrl-C, upon which pytest stops the lab."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            subprocess.run(["kill", f"-{number}", "--", f"-{process.pid}"], check=False, stderr=subprocess.DEVNULL)
            process.wait(_END_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main())
