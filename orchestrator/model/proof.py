"""A proof: one measured statement about the live host or one guest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.model.uplink import VepaReadings

WEAKER = "weaker, because "
"""Prefix of evidence that states a limit of the proof on this host."""


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

    def measured_as(self, result: Measurement) -> Proof:
        return replace(self, verdict=result.verdict, figure=result.figure, evidence=result.evidence, readings=result.readings)


def count_findings(findings: Sequence[str], evidence: Sequence[str]) -> Measurement:
    """Passes without findings; the figure is their number."""
    return Measurement(Verdict.FAIL if findings else Verdict.PASS, len(findings), (*findings, *evidence))


def not_measured(reason: str) -> Measurement:
    return Measurement(Verdict.NOT_MEASURED, None, (reason,))
