"""Events for the operator about host and configuration: one per change, not one per check."""

from __future__ import annotations

import logging
import threading

from orchestrator.errors import LedgerError
from orchestrator.ledger import EventKind, Ledger

_log = logging.getLogger(__name__)

HOST_TOPIC = "configuration and host"
"""Topic of `planning.host_check`."""


class HostWarnings:
    def __init__(self, ledger: Ledger, subject: str) -> None:
        self._ledger, self._subject = ledger, subject
        self._lock = threading.Lock()
        self._last: dict[str, tuple[str, ...]] = {}

    def report(self, topic: str, warnings: tuple[str, ...]) -> None:
        with self._lock:
            before, self._last[topic] = self._last.get(topic, ()), warnings
        if warnings != before:
            self._write(self._subject, f"{topic}: {'; '.join(warnings) or 'no warnings remain'}")

    def note(self, guest: str, warnings: tuple[str, ...]) -> None:
        """For operators only: warnings about a guest may name what its tenant may not see."""
        if warnings:
            self._write(guest, "; ".join(warnings))

    def _write(self, subject: str, detail: str) -> None:
        try:
            self._ledger.append_event(EventKind.HOST_WARNING, subject, detail)
        except LedgerError as error:
            _log.error("%s: %s (%s)", subject, detail, error)
