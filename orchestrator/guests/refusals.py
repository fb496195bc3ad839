"""Writes refused requests to the event log, a limited number per minute: they must not displace other events."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.errors import Conflict, LedgerError, NoRoom, NotFound, OrchestratorError, RequestError
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import Identity

_log = logging.getLogger(__name__)

_REFUSALS = (RequestError, NotFound, Conflict, NoRoom)
"""Errors of a request; all other errors are the host's."""

MAX_PER_MINUTE = 30
_MAX_DETAIL = 500
"""Characters: a reason can contain the request, which can be long."""
_PERIOD = 60.0


class RefusalLog:
    """Logs up to ``MAX_PER_MINUTE`` refusals per caller, and once per minute that there are more.

    Args:
        observe_unlogged: gets kind and seconds of each refusal that is not logged; must not raise.
        clock: monotonic seconds.
    """

    def __init__(
        self, ledger: Ledger, observe_unlogged: Callable[[str, float], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger, self._observe_unlogged, self._clock = ledger, observe_unlogged, clock
        self._lock = threading.Lock()
        # Caller -> (start of its minute, refusals within it). Bounded by the number of accounts and tokens.
        self._counts: dict[str, tuple[float, int]] = {}

    @contextmanager
    def logging(self, name: str, caller: Identity) -> Iterator[None]:
        """Logs an error of the block as the refusal of this guest."""
        started_at = time.monotonic()
        try:
            yield
        except OrchestratorError as error:
            try:
                self.log(name, error, caller, time.monotonic() - started_at)
            except LedgerError as full:
                _log.error("%s", full)  # the caller needs the first error
            raise

    def log(self, name: str, error: OrchestratorError, caller: Identity, seconds: float) -> None:
        kind = EventKind.REFUSED if isinstance(error, _REFUSALS) else EventKind.PLAN_FAILED
        detail, now = error.message, self._clock()
        with self._lock:
            since, count = self._counts.get(caller.name, (now, 0))
            if now - since >= _PERIOD:
                since, count = now, 0
            self._counts[caller.name] = since, count + 1
        if count < MAX_PER_MINUTE:
            detail = detail if len(detail) <= _MAX_DETAIL else f"{detail[:_MAX_DETAIL]}..."
            self._ledger.append_event(kind, name, detail, who=caller.name, tenant=caller.tenant, took=seconds)
            return
        self._observe_unlogged(kind, seconds)
        if count == MAX_PER_MINUTE:
            detail = f"more than {MAX_PER_MINUTE} refused requests within a minute; further ones are not logged"
            self._ledger.append_event(EventKind.REFUSED, name, detail, who=caller.name, tenant=caller.tenant)
