"""The event about a change of a guest, as one value."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import LedgerError, OrchestratorError
from orchestrator.ledger import Claim, EventKind, Ledger
from orchestrator.model.access import MANAGER

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    kind: EventKind | None
    """None if another event has reported the change already."""
    detail: str = ""
    caller: str = MANAGER.name
    started_at: float | None = None
    """``time.monotonic()``; None if the event has no duration."""


def log_event(ledger: Ledger, claim: Claim, outcome: Outcome) -> None:
    """Writes an event about a completed change. If that fails (disk full), the event goes to the journal."""
    if outcome.kind is None:
        return
    seconds = None if outcome.started_at is None else time.monotonic() - outcome.started_at
    try:
        ledger.append_event(outcome.kind, claim.plan.name, outcome.detail, who=outcome.caller, tenant=claim.owner, took=seconds)
    except LedgerError as error:
        text = "%s %s by %s: %s; not in the event log: %s"
        _log.error(text, claim.plan.name, outcome.kind, outcome.caller, outcome.detail, error.message)


def log_errors(work: Callable[[], object]) -> None:
    """For work after an error or event. Its own error goes to the journal; reconciliation repeats the work."""
    try:
        work()
    except OrchestratorError as error:
        _log.error("%s", error)
