"""What guests own, the undo journal and the event log: one SQLite file."""

from orchestrator.ledger.records import TROUBLE, Claim, Event, Quarantined, Reading, UndoRecord
from orchestrator.ledger.store import Ledger

__all__ = ["TROUBLE", "Claim", "Event", "Ledger", "Quarantined", "Reading", "UndoRecord"]
