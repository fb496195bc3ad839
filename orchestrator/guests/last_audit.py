"""Remembers the proofs of the last audits, and which guests have changed since they began."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from uuid import UUID

from orchestrator.ledger import Ledger
from orchestrator.model.host_view import LastAudit, LastProof
from orchestrator.model.proof import Proof

Versions = Mapping[str, tuple[UUID, int]]
"""Name of a guest → its id and version. The version grows with each change, such as a restart."""


@dataclass(frozen=True)
class _Audit:
    """The proofs that no later audit has measured again."""

    ended: float
    proofs: tuple[Proof, ...]
    versions: Versions


class AuditMemory:
    """For several threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._audits: tuple[_Audit, ...] = ()  # the newest first

    def read_versions(self) -> Versions:
        return {claim.plan.name: (claim.plan.uuid, claim.version) for claim in self._ledger.read().claims}

    def observe(self, proofs: Iterable[Proof], versions: Versions, *, host_only: bool = False) -> None:
        """``versions``: of ``read_versions`` before the audit. ``host_only``: proofs of guests stay as they were."""
        new = _Audit(time.monotonic(), tuple(proofs), versions)
        measured = {(proof.name, proof.subject) for proof in new.proofs}
        with self._lock:
            older = [
                replace(one, proofs=tuple(proof for proof in one.proofs if (proof.name, proof.subject) not in measured))
                for one in (self._audits if host_only else ())
            ]
            self._audits = (new, *(one for one in older if one.proofs))

    def show(self) -> LastAudit | None:
        """Proofs of guests that do not exist any more are left out."""
        audits = self._audits  # read once: other threads write it
        if not audits:
            return None
        now, clock = self.read_versions(), time.monotonic()
        shown = tuple(proof for audit in reversed(audits) for proof in _show(audit, now, clock))
        return LastAudit(clock - audits[0].ended, shown)


def _show(audit: _Audit, now: Versions, clock: float) -> Iterator[LastProof]:
    before = audit.versions
    for proof in audit.proofs:
        name = proof.subject
        if name in now or name not in before:
            yield LastProof(
                proof.name, name, proof.verdict, proof.figure, proof.unit, next(iter(proof.evidence), ""),
                before.get(name) != now[name] if name in now else before != now, clock - audit.ended,
            )  # fmt: skip
