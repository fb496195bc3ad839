"""Signs the evidence of an audit with the key of this host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.audit.evidence import Subject, collect_evidence
from orchestrator.audit.report import Auditor
from orchestrator.errors import LedgerError
from orchestrator.guests.last_audit import AuditMemory
from orchestrator.ledger import Ledger
from orchestrator.model.event import ChainReport
from orchestrator.model.proof import Proof

CREDENTIAL = "nohype-audit-key"
"""Name of the credential (systemd.exec(5), LoadCredentialEncrypted=)."""


@dataclass(frozen=True)
class EvidenceSigner:
    """``key``: the file of the configuration; a credential of systemd takes precedence. Read for each signature."""

    auditor: Auditor
    subject: Subject
    ledger: Ledger
    key: str
    observe: Callable[[Iterable[Proof]], object]
    audits: AuditMemory | None = None

    def verify_events(self, at: int | None = None) -> ChainReport:
        return self.ledger.event_chain(at)

    def sign(self, frames: int, nonce: str) -> bytes:
        """Measures all proofs and signs them. Raises HostError without a key that can be used."""
        # Only now: the package cryptography takes memory, and most managers never sign.
        from orchestrator.evidence import keys

        key = keys.load_private(self._find_key())  # before the measurement, which takes seconds
        versions = self.audits.read_versions() if self.audits else {}
        guests, proofs = self.auditor.measure(frames)
        self.observe(proofs)
        if self.audits:
            self.audits.observe(proofs, versions)
        chain = self.ledger.event_chain()
        # The signed event must not be lost by a power cut.
        self.ledger.event_head()
        try:
            return keys.sign(collect_evidence(self.subject, guests, proofs, chain, nonce), key)
        except ValueError as error:
            raise LedgerError(f"cannot sign the evidence: it has {error}") from None

    def _find_key(self) -> Path:
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if folder and (found := Path(folder) / CREDENTIAL).exists():
            return found
        return Path(self.key)
