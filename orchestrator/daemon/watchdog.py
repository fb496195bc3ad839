"""Notifies systemd's watchdog while the manager's parts work. systemd restarts a manager that hangs; guests keep running."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from orchestrator.daemon.systemd import notify_systemd

_log = logging.getLogger(__name__)

_NOTIFICATIONS_PER_TIMEOUT = 3
"""More than one, so that a late notification does no harm."""


class Heartbeat:
    """Runs the checks in its own thread every ``interval`` seconds.

    Args:
        checks: by name; each raises, or hangs, if the part does not work. They must be cheap.
        status: a line for `systemctl status`.
    """

    def __init__(self, checks: Mapping[str, Callable[[], object]], interval: float, status: Callable[[], str] = str) -> None:
        self._checks, self.interval, self._status = checks, interval, status
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    @classmethod
    def for_watchdog(
        cls, checks: Mapping[str, Callable[[], object]], seconds: float, status: Callable[[], str] = str
    ) -> Heartbeat:
        return cls(checks, seconds / _NOTIFICATIONS_PER_TIMEOUT, status)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Does not wait for a check that hangs."""
        self._stop.set()
        self._thread.join(timeout=1)

    def check_and_notify(self) -> bool:
        """Returns whether all checks passed and systemd was notified."""
        for name, check in self._checks.items():
            try:
                check()
            except Exception as error:
                # The next check may pass; if none does, systemd restarts the manager.
                _log.error("watchdog not notified: %s: %s", name, error)
                return False
        notify_systemd(f"WATCHDOG=1\nSTATUS={self._describe()}")
        return True

    def _describe(self) -> str:
        try:
            return self._status().replace("\n", " ")
        except Exception as error:
            return f"serving; status not available: {error}".replace("\n", " ")

    def _work(self) -> None:
        while not self._stop.wait(self.interval):
            self.check_and_notify()
