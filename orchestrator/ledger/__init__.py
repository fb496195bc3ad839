"""What guests own, the undo journal and the event log: one SQLite file."""

from orchestrator.ledger.records import Claim, Event, Quarantined, Reading, UndoRecord
from orchestrator.ledger.store import Ledger

__all__ = ["Claim", "Event", "Ledger", "Quarantined", "Reading", "UndoRecord"]
