"""The manager's sign of life for systemd's watchdog: sent only while its parts really work.

A manager that hangs is so replaced. That is harmless: guests go on without a manager, and the next one recovers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from orchestrator.daemon.systemd import notify_systemd

_log = logging.getLogger(__name__)

# Three signs in the time that systemd waits: one may be late.
_SIGNS = 3


class Heartbeat:
    """Looks at the manager's parts and tells systemd that it works; a thread of its own.

    Args:
        checks: what must work, by name; each raises, or does not return, if it does not. They must be cheap.
        interval: seconds from look to look.
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
        """A heartbeat that keeps a watchdog of so many seconds content."""
        return cls(checks, seconds / _SIGNS, status)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends; a check that hangs is not waited for."""
        self._stop.set()
        self._thread.join(timeout=1)

    def beat(self) -> bool:
        """Looks once; returns whether all works, and if so tells systemd."""
        for name, check in self._checks.items():
            try:
                check()
            except Exception as error:
                # Whatever is wrong: the next look may find it well; if none does, systemd starts a new manager.
                _log.error("no sign of life for systemd's watchdog, %s does not work: %s", name, error)
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
            self.beat()
