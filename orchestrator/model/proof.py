"""A proof: one measured statement about the live host or one guest."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WEAKER = "weaker, because "
"""How evidence begins that says what a proof does not cover on this host."""


class Verdict(StrEnum):
    """What a measurement says. Not being able to measure is an answer of its own, never a pass."""

    PASS = "pass"
    FAIL = "fail"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Proof:
    """A statement with its figure and the evidence that was read to decide it.

    Attributes:
        name: what is claimed, ``core-exclusive`` (see docs/promises.md).
        subject: ``host`` or a guest's name.
        figure: the number that decided; 0 is the good value where faults are counted. None if not measured.
        unit: what the figure counts.
        evidence: what was read, from where, one statement an entry; faults first.
    """

    name: str
    subject: str
    verdict: Verdict
    figure: float | None
    unit: str
    evidence: tuple[str, ...]


def proof_from_json(fields: dict[str, object]) -> Proof:
    """Reads back what ``to_plain`` made of a proof."""
    evidence = fields["evidence"]
    assert isinstance(evidence, list)
    return Proof(**{**fields, "verdict": Verdict(fields["verdict"]), "evidence": tuple(evidence)})  # type: ignore[arg-type]


def count_faults(name: str, subject: str, unit: str, faults: list[str], evidence: list[str]) -> Proof:
    """A proof that passes if no fault was found; the figure is the number of faults."""
    verdict = Verdict.FAIL if faults else Verdict.PASS
    return Proof(name, subject, verdict, len(faults), unit, (*faults, *evidence))


def not_measured(name: str, subject: str, unit: str, reason: str) -> Proof:
    """A proof that could not be measured, with the reason."""
    return Proof(name, subject, Verdict.NOT_MEASURED, None, unit, (reason,))
