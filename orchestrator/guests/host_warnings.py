"""What of the host or the configuration an operator should look at, as events: once for each change, not at each look."""

from __future__ import annotations

import logging
import threading

from orchestrator.errors import LedgerError
from orchestrator.ledger import EventKind, Ledger

_log = logging.getLogger(__name__)

HOST_TOPIC = "configuration and host"
"""Topic of what `planning.host_check` finds."""


class HostWarnings:
    """Logs warnings.

    Args:
        subject: the subject of the events that concern no guest.
    """

    def __init__(self, ledger: Ledger, subject: str) -> None:
        self._ledger, self._subject = ledger, subject
        self._lock = threading.Lock()
        self._last: dict[str, tuple[str, ...]] = {}

    def report(self, topic: str, warnings: tuple[str, ...]) -> None:
        """Logs the warnings of a topic if they differ from the last ones."""
        with self._lock:
            before, self._last[topic] = self._last.get(topic, ()), warnings
        if warnings != before:
            self._write(self._subject, f"{topic}: {'; '.join(warnings) or 'nothing is left of what was reported'}")

    def note(self, guest: str, warnings: tuple[str, ...]) -> None:
        """Logs warnings about one guest, for operators: they may name what its tenant may not see."""
        if warnings:
            self._write(guest, "; ".join(warnings))

    def _write(self, subject: str, detail: str) -> None:
        try:
            self._ledger.log(EventKind.HOST_WARNING, subject, detail)
        except LedgerError as error:
            _log.error("%s: %s (%s)", subject, detail, error)  # what was warned of goes on all the same
