"""The thread that reads the kernel's histograms of VM exits, as long as a guest needs that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from orchestrator.errors import OrchestratorError
from orchestrator.guests.host_setup import HOST
from orchestrator.ledger import Event, Ledger

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 15.0
"""After a check that failed."""


class ExitWatch:
    """Calls ``checks`` again and again. Each returns after how many seconds it is due again; None: after the next change of a
    guest. All are called in each round, so that a busy host has one thread that wakes up once per second.
    """

    def __init__(self, ledger: Ledger, checks: Sequence[Callable[[], float | None]]) -> None:
        self._checks = checks
        self._closed = False
        self._changed = threading.Event()
        self._changed.set()
        ledger.subscribe(self._on_event)

    def start(self) -> None:
        threading.Thread(target=self._work, name="exits", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    def _work(self) -> None:
        while True:
            self._changed.clear()  # before the reading: a later change is read in the next round
            if self._closed:
                return
            due = [seconds for check in self._checks if (seconds := _guard(check)) is not None]
            self._changed.wait(min(due, default=None))

    def _on_event(self, event: Event) -> None:
        if event.subject != HOST:
            self._changed.set()


def _guard(check: Callable[[], float | None]) -> float | None:
    try:
        return check()
    except OrchestratorError as error:
        _log.error("cannot check the VM exits of guests: %s", error)
    except Exception:
        _log.exception("internal error while checking the VM exits of guests, continuing")
    return _RETRY_SECONDS
