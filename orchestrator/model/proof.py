"""A proof: one measured statement about the live host or one guest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.model.uplink import VepaReadings

WEAKER = "weaker, because "
"""Prefix of evidence that states a limit of the proof on this host."""


Values = dict[str, bool | int | float | str]
"""What a proof has read, by name, for programs: a comparison needs numbers and texts, not sentences."""


class Verdict(StrEnum):
    """A proof that could not be measured never passes."""

    PASS = "pass"
    FAIL = "fail"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measurement:
    """The result of a proof, without name, subject and unit."""

    verdict: Verdict
    figure: float | None  # the number that decided; None if not measured
    evidence: tuple[str, ...]  # what was read and from where, one statement per entry; findings first
    readings: VepaReadings | None = None  # values that a measurement made elsewhere can complete
    values: Values = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Proof:
    """A statement of docs/promises.md with its result."""

    name: str
    subject: str  # "host" or the name of a guest
    verdict: Verdict
    figure: float | None
    unit: str  # of the figure
    evidence: tuple[str, ...]
    readings: VepaReadings | None = None
    values: Values = field(default_factory=dict, hash=False)

    def measured_as(self, result: Measurement) -> Proof:
        return replace(
            self, verdict=result.verdict, figure=result.figure, evidence=result.evidence, readings=result.readings,
            values=result.values,
        )  # fmt: skip


def count_findings(findings: Sequence[str], evidence: Sequence[str], values: Values | None = None) -> Measurement:
    """Passes without findings; the figure is their number."""
    verdict = Verdict.FAIL if findings else Verdict.PASS
    return Measurement(verdict, len(findings), (*findings, *evidence), values=values or {})


def not_measured(reason: str) -> Measurement:
    return Measurement(Verdict.NOT_MEASURED, None, (reason,))
