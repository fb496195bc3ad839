"""What guests own, the undo journal and the event log: one SQLite file."""

from orchestrator.ledger.store import Ledger
from orchestrator.model.claim import TROUBLE, Claim, Event, Quarantined, Reading, UndoRecord

__all__ = ["TROUBLE", "Claim", "Event", "Ledger", "Quarantined", "Reading", "UndoRecord"]
