"""The open ledger: claims, undo journal and event log of one file.

What a method has written outlives the process when it returns. A method that raises LedgerError (the file cannot be read or
written) has changed nothing, with one exception: if the fsync after a change of state fails, a power cut may undo the change.
On a full disk guests can still be ended: there is a reserve for that (`reserve`). The ledger holds what was promised; whether
the host agrees is measured by the audit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.ledger.claims import Claims, PendingClaim
from orchestrator.ledger.database import BUSY_TIMEOUT, Database, Trace
from orchestrator.ledger.events import EventLog
from orchestrator.ledger.journal import UndoJournal
from orchestrator.ledger.loading import load
from orchestrator.ledger.retention import KEEP
from orchestrator.model.claim import Claim
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest


class Ledger:
    """An open ledger, for several threads.

    Args:
        path: created with its folder if it does not exist.
        accept: gets the claims; raises if the ledger must not be opened. Nothing was written then.
        keep: how many events of each tenant are kept, see ``retention.KEEP``.
        busy: seconds to wait for another program that holds the file.
        trace: called with each statement that writes, before it is executed, and with ``database.FSYNC`` before an fsync.

    Raises:
        LedgerError: the file is damaged, not a ledger, of a newer version, or cannot be opened.
    """

    def __init__(
        self, path: Path, *, accept: Callable[[Sequence[Claim]], object] = lambda _: None, keep: int = KEEP,
        busy: float = BUSY_TIMEOUT, trace: Trace | None = None,
    ) -> None:  # fmt: skip
        self._database = Database(path, lambda copy: accept(tuple(load(copy, path).claims.values())), busy, trace)
        try:
            claims, journal, events = Claims(self._database), UndoJournal(self._database), EventLog(self._database, keep)
        except BaseException:
            self._database.close()
            raise
        self.read, self.find, self.begin_claim = claims.read, claims.find, claims.begin_claim
        self.set_state, self.release = claims.set_state, claims.release
        self.quarantine, self.quarantined = claims.quarantine, claims.quarantined
        self.add_undo_record, self.drop_undo_record, self.undo_records = journal.add, journal.drop, journal.read
        self.append_event, self.subscribe = events.append, events.subscribe
        self.events, self.last_event = events.read, events.last_id
        self.close = self._database.close

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def trouble(self) -> str:
        """Why the ledger cannot be written; empty if it can."""
        return self._database.trouble

    def claim(self, plan: Plan, generation: int, request: GuestRequest, owner: str = "") -> Claim:
        """As `begin_claim`, and waits until the claim is on the disk."""
        return self.begin_claim(plan, generation, request, owner).wait()

    def raise_if_stalled(self, limit: float) -> None:
        """Raises if the file cannot be read.

        Raises:
            LedgerError: it cannot be read.
            OrchestratorError: a write or an fsync has been running for more than ``limit`` seconds.
        """
        self._database.raise_if_stalled(limit)
        self.last_event()


__all__ = ["Ledger", "PendingClaim"]
