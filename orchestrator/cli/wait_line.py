"""A line on the terminal that says how long a command has been waiting for the manager, and what the manager does meanwhile."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.cli.output import printable
from orchestrator.cli.terminal import read_size
from orchestrator.client import Client
from orchestrator.errors import OrchestratorError

FIRST_SECONDS = 2.0
"""Shorter waits show nothing."""
_PAUSE = 0.5
_BAR = 20


@contextmanager
def show_wait(what: str, read_detail: Callable[[], str] = str) -> Iterator[None]:
    """Shows nothing unless standard error is a terminal; the line is gone at the end.

    ``read_detail`` is called again and again in another thread; must not raise.
    """
    if not sys.stderr.isatty():
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_draw, args=(what, read_detail, stop), name="wait", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(1)  # the manager may not respond to the question for the detail
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


@contextmanager
def show_guest_wait(client: Client, name: str, what: str) -> Iterator[None]:
    """As ``show_wait``, with the work on the guest's disks, or else its state."""

    def read() -> str:
        try:
            guest = client.guest(name)
        except OrchestratorError:
            return ""  # not claimed yet
        if not (progress := guest["progress"]):
            return str(guest["state"])
        filled = progress["percent"] * _BAR // 100
        return f"{progress['phase']} {progress['disk']} [{'#' * filled}{'-' * (_BAR - filled)}] {progress['percent']}%"

    with show_wait(f"{what} guest {name}", read):
        yield


def _draw(what: str, read_detail: Callable[[], str], stop: threading.Event) -> None:
    started = time.monotonic()
    pause = FIRST_SECONDS
    while not stop.wait(pause):
        pause = _PAUSE
        line = printable(f"{what}, {time.monotonic() - started:.0f} s  {read_detail()}")
        if not stop.is_set():
            sys.stderr.write(f"\r{line[: read_size(sys.stderr.fileno())[0] - 1]}\x1b[K")
            sys.stderr.flush()
