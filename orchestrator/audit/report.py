"""The audit: all proofs of a host, in the order of the catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.audit.catalogue import PROOFS, GuestRow, HostRow
from orchestrator.audit.facts import Facts, Source
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import Proof, Verdict


@dataclass(frozen=True)
class Auditor:
    source: Source

    def run(self, frames: int = 0, *, host_only: bool = False) -> tuple[Proof, ...]:
        """Takes at least ``window`` seconds if a guest runs, and changes nothing on the host.

        ``frames`` and errors as of ``Facts``. ``host_only`` leaves out the proofs of guests. A guest that libvirt cannot describe
        is reported nevertheless: the proofs of the host do not cover it either.
        """
        return self.measure(frames, host_only=host_only)[1]

    def measure(self, frames: int = 0, *, host_only: bool = False) -> tuple[tuple[RunningGuest, ...], tuple[Proof, ...]]:
        """As `run`, with the guests that were measured."""
        facts = Facts(self.source, frames, host_only=host_only)
        subjects = () if host_only else facts.guests
        proofs: list[Proof] = []
        # A guest that libvirt cannot describe is reported once, not by every proof.
        first = next(row for row in PROOFS if isinstance(row, GuestRow))
        proofs += [first.unmeasured(reason, name) for name, reason in sorted(facts.unread.items())]
        for row in PROOFS:
            if isinstance(row, GuestRow):
                proofs += [row.prove(facts, guest) for guest in subjects]
            elif isinstance(row, HostRow):
                proofs.append(row.prove(facts))
        return facts.guests, tuple(proofs)


def summarize(proofs: Iterable[Proof]) -> Verdict:
    """Passes only if every proof passed."""
    return Verdict.PASS if all(proof.verdict is Verdict.PASS for proof in proofs) else Verdict.FAIL
