"""Refused requests go to the event log, a limited number a minute: they must not push other events out of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.errors import Conflict, LedgerError, NoRoom, NotFound, OrchestratorError, RequestError
from orchestrator.guests.observer import Observer
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import Identity

_log = logging.getLogger(__name__)

_REFUSALS = (RequestError, NotFound, Conflict, NoRoom)
"""Errors that say what is wrong with a request; any other one is the host's."""

MOST = 30
_LONGEST = 500
"""Characters of a reason: it may repeat what was asked for, which is as long as somebody likes."""
_PERIOD = 60.0


class RefusalLog:
    """Logs up to ``MOST`` refusals of each person a minute; the one after those only says that there are more.

    Args:
        observer: is told of those that are not logged.
        clock: seconds that only grow.
    """

    def __init__(self, ledger: Ledger, observer: Observer, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger, self._observer, self._clock = ledger, observer, clock
        self._lock = threading.Lock()
        # Person -> (beginning of the minute, refusals within it). As many as there are accounts and tokens.
        self._counts: dict[str, tuple[float, int]] = {}

    @contextmanager
    def logging(self, name: str, who: Identity) -> Iterator[None]:
        """Logs an error of the block: somebody does not get a guest of this name."""
        began = time.monotonic()
        try:
            yield
        except OrchestratorError as error:
            try:
                self.log(name, error, who, time.monotonic() - began)
            except LedgerError as full:
                _log.error("%s", full)  # who asked has to know of the other
            raise

    def log(self, name: str, error: OrchestratorError, who: Identity, took: float) -> None:
        """Somebody did not get a guest of this name, after ``took`` seconds.

        Raises:
            LedgerError: it can't be written.
        """
        kind, why = EventKind.REFUSED if isinstance(error, _REFUSALS) else EventKind.PLAN_FAILED, error.message
        now = self._clock()
        with self._lock:
            since, count = self._counts.get(who.name, (now, 0))
            if now - since >= _PERIOD:
                since, count = now, 0
            self._counts[who.name] = since, count + 1
        if count < MOST:
            why = why if len(why) <= _LONGEST else f"{why[:_LONGEST]}..."
            self._ledger.log(kind, name, why, who=who.name, tenant=who.tenant, took=took)
            return
        self._observer.observe_refusal(kind, took)
        if count == MOST:
            why = f"more than {MOST} requests within a minute; further ones of this minute are not logged"
            self._ledger.log(EventKind.REFUSED, name, why, who=who.name, tenant=who.tenant)
