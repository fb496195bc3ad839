"""Notifies systemd's watchdog only while the manager's parts work. systemd restarts a manager that hangs; guests keep running."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from orchestrator.daemon.systemd import notify_systemd

_log = logging.getLogger(__name__)

_NOTIFICATIONS_PER_TIMEOUT = 3
"""One may be late."""


class Heartbeat:
    """Runs the checks in a thread of its own.

    Args:
        checks: by name; each raises, or does not return, if the part does not work. They must be cheap.
        interval: seconds between checks.
        status: a line for `systemctl status`.
    """

    def __init__(self, checks: Mapping[str, Callable[[], object]], interval: float, status: Callable[[], str] = str) -> None:
        self._checks, self._interval, self._status = checks, interval, status
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
        """Notifies systemd if all checks pass; returns whether they do."""
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
            return f"serving, but: {error}".replace("\n", " ")

    def _work(self) -> None:
        while not self._stop.wait(self._interval):
            self.check_and_notify()
