"""Remembers the proofs of the last audit, and which guests have changed since it began."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

from orchestrator.ledger import Ledger
from orchestrator.model.host_view import LastAudit, LastProof
from orchestrator.model.proof import Proof

Versions = Mapping[str, tuple[UUID, int]]
"""Name of a guest → its id and version. The version grows with each change, such as a restart."""


@dataclass(frozen=True)
class _Audit:
    ended: float
    proofs: tuple[Proof, ...]
    versions: Versions


class AuditMemory:
    """For several threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._last: _Audit | None = None

    def read_versions(self) -> Versions:
        return {claim.plan.name: (claim.plan.uuid, claim.version) for claim in self._ledger.read().claims}

    def observe(self, proofs: Iterable[Proof], versions: Versions) -> None:
        """``versions``: of ``read_versions`` before the audit."""
        self._last = _Audit(time.monotonic(), tuple(proofs), versions)

    def show(self) -> LastAudit | None:
        """Proofs of guests that do not exist any more are left out."""
        last = self._last  # read once: other threads write it
        if last is None:
            return None
        now = self.read_versions()
        shown = tuple(
            LastProof(
                proof.name, proof.subject, proof.verdict, proof.figure, proof.unit, next(iter(proof.evidence), ""),
                last.versions.get(proof.subject) != now[proof.subject] if proof.subject in now else last.versions != now,
            )
            for proof in last.proofs
            if proof.subject in now or proof.subject not in last.versions
        )  # fmt: skip
        return LastAudit(time.monotonic() - last.ended, shown)
