"""Claims of guests, the undo journal and the event log in one SQLite file."""

from orchestrator.ledger.store import Ledger, PendingClaim
from orchestrator.model.claim import Claim, ClaimSnapshot, Quarantined, UndoRecord
from orchestrator.model.event import Event, EventKind

__all__ = ["Claim", "Event", "EventKind", "Ledger", "PendingClaim", "Quarantined", "ClaimSnapshot", "UndoRecord"]
