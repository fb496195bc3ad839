"""The open ledger: claims, undo journal and event log of one file.

A written change outlives the process when the method returns. A method that raises LedgerError has changed nothing, with one
exception: if the fsync after a change of state fails, a power cut may revert the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.ledger.claims import Claims, PendingClaim
from orchestrator.ledger.core_starts import CoreStarts
from orchestrator.ledger.database import BUSY_TIMEOUT, Database, Trace
from orchestrator.ledger.events import EventLog
from orchestrator.ledger.journal import UndoJournal
from orchestrator.ledger.loading import load
from orchestrator.ledger.retention import KEEP
from orchestrator.ledger.switches import Switches
from orchestrator.ledger.uplinks import UplinkEdges
from orchestrator.model.claim import Claim
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest


class Ledger:
    """An open ledger, for several threads. Arguments and errors as of `Database`; ``keep`` as ``retention.KEEP``."""

    def __init__(
        self, path: Path, *, accept: Callable[[Sequence[Claim]], object] = lambda _: None, keep: int = KEEP,
        busy: float = BUSY_TIMEOUT, trace: Trace | None = None,
    ) -> None:  # fmt: skip
        self.path = path
        self._database = Database(path, lambda copy: accept(tuple(load(copy, path).claims.values())), busy, trace)
        try:
            claims, journal, events = Claims(self._database), UndoJournal(self._database), EventLog(self._database, keep)
            edges = UplinkEdges(self._database)
        except BaseException:
            self._database.close()
            raise
        self.read, self.find, self.begin_claim = claims.read, claims.find, claims.begin_claim
        self.set_state, self.release = claims.set_state, claims.release
        self.record_host_key, self.record_disengagement = claims.record_host_key, claims.record_disengagement
        self.keep_disks, self.add_disk_check, self.disk_checks = claims.keep_disks, claims.add_disk_check, claims.disk_checks
        self.networks, self.create_network, self.delete_network = claims.networks, claims.create_network, claims.delete_network
        self.quarantine, self.quarantined = claims.quarantine, claims.quarantined
        self.add_undo_record, self.drop_undo_record, self.undo_records = journal.add, journal.drop, journal.read
        self.append_event, self.subscribe = events.append, events.subscribe
        self.events, self.last_event = events.read, events.last_id
        self.event_chain, self.event_head = events.read_chain, events.read_synced_head
        switches = Switches(self._database)
        self.switches, self.add_switch, self.delete_switch = switches.read, switches.add, switches.delete
        self.uplink_edges, self.set_uplink_edge = edges.read, edges.set
        starts = CoreStarts(self._database)
        self.core_start, self.record_core_start = starts.read, starts.record
        self.close = self._database.close

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def trouble(self) -> str:
        """The reason why the ledger cannot be written; empty if it can."""
        return self._database.trouble

    def claim(self, plan: Plan, generation: int, request: GuestRequest, owner: str = "", creator: str = "") -> Claim:
        """`begin_claim`, followed by `PendingClaim.wait`."""
        return self.begin_claim(plan, generation, request, owner, creator).wait()

    def raise_if_stalled(self, limit: float) -> None:
        """Raises LedgerError if the file cannot be read, OrchestratorError if a write or fsync takes more than ``limit`` s."""
        self._database.raise_if_stalled(limit)
        self.last_event()


__all__ = ["Ledger", "PendingClaim"]
