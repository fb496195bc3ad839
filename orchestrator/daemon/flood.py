"""Limits log messages per period, so that clients cannot fill the log; the number of suppressed messages is logged afterwards.

journald drops every further message of a service that has written 10,000 within 30 s (journald.conf(5), RateLimitBurst=). A
client can trigger any message of a request any number of times, so the limit is here and not at each message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

PERIOD = 30.0
EACH = 100
"""Messages per place in the code, and for events per kind and tenant."""
ALL = 3000
"""Messages below WARNING in total. Warnings are rare, and limited by ``EACH`` only."""

Key = tuple[object, ...]


class FloodFilter(logging.Filter):
    """``write`` handles the message with the number of suppressed ones; ``later`` is a timer, ``clock`` is monotonic."""

    def __init__(
        self,
        write: Callable[[logging.LogRecord], object],
        later: Callable[[float, Callable[[], None]], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._write, self._later, self._clock = write, later or _call_later, clock
        self._lock = threading.Lock()
        self._since = clock()
        self._total = 0
        self._counts: dict[Key, int] = {}
        self._suppressed: dict[Key, tuple[int, logging.LogRecord]] = {}
        self._due = False

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record, _Count):
            return True
        key = _build_key(record)
        with self._lock:
            now = self._clock()
            if now - self._since >= PERIOD and not self._due:
                self._since, self._total, self._counts = now, 0, {}
            count = self._counts.get(key, 0)
            if count < EACH and (self._total < ALL or record.levelno >= logging.WARNING):
                self._counts[key] = count + 1
                self._total += 1
                return True
            number, _ = self._suppressed.get(key, (0, record))
            self._suppressed[key] = number + 1, record
            starts_timer, self._due = not self._due, True
        if starts_timer:
            # A timer exists only now: an idle manager does not wake up.
            self._later(max(0.0, self._since + PERIOD - now), self._report)
        return False

    def _report(self) -> None:
        with self._lock:
            suppressed, self._suppressed, self._due = self._suppressed, {}, False
            self._since, self._total, self._counts = self._clock(), 0, {}
        for number, last in suppressed.values():
            text = "%d more messages like this one were suppressed within %g s: %s"
            arguments = (number, PERIOD, last.getMessage())
            self._write(_Count(last.name, last.levelno, last.pathname, last.lineno, text, arguments, None))


class _Count(logging.LogRecord):
    pass


def _build_key(record: logging.LogRecord) -> Key:
    """All events are logged at one place in the code: kind and tenant distinguish them."""
    event = getattr(record, "event", None)
    return record.name, record.pathname, record.lineno, getattr(event, "kind", None), getattr(event, "tenant", None)


def _call_later(seconds: float, work: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.name = "log"
    timer.start()
