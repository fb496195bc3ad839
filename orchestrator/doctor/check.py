"""A check of a server, and what it has found. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.doctor.facts import Facts
from orchestrator.errors import OrchestratorError
from orchestrator.model.proof import Verdict


class Principle(StrEnum):
    """What NoHype asks of a server."""

    CORES = "one core per guest"
    MEMORY = "memory allocated in advance"
    DEVICES = "devices assigned to guests"
    NETWORK = "frames switched by the network"
    MANAGEMENT = "management apart from guests"


@dataclass(frozen=True)
class Finding:
    """``needed`` and ``remedy`` are for verdicts other than `pass`; the remedy is one instruction for this server."""

    verdict: Verdict
    found: str
    needed: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A question about a server. Only those that are ``required`` decide whether it is fit."""

    name: str
    principle: Principle
    title: str  # what must be true
    source: str  # what is read
    measure: Callable[[Facts], Finding]
    required: bool = True


@dataclass(frozen=True)
class Result:
    check: Check
    finding: Finding

    @property
    def is_fault(self) -> bool:
        return self.check.required and self.finding.verdict is Verdict.FAIL

    @property
    def is_open(self) -> bool:
        return self.check.required and self.finding.verdict is Verdict.NOT_MEASURED


def passed(found: str) -> Finding:
    return Finding(Verdict.PASS, found)


def failed(found: str, needed: str, remedy: str) -> Finding:
    return Finding(Verdict.FAIL, found, needed, remedy)


def not_measured(found: str, needed: str, remedy: str = "") -> Finding:
    return Finding(Verdict.NOT_MEASURED, found, needed, remedy)


def run_checks(facts: Facts, checks: Iterable[Check]) -> tuple[Result, ...]:
    """An error of one check hides no other one."""
    return tuple(Result(check, _run(check, facts)) for check in checks)


def _run(check: Check, facts: Facts) -> Finding:
    try:
        return check.measure(facts)
    except OrchestratorError as error:
        return not_measured(error.message, check.title, error.hint)
    except Exception as error:  # an unknown format of one kernel file
        return not_measured(f"what was read could not be parsed: {type(error).__name__}: {error}", check.title)


def find_verdict(results: Iterable[Result]) -> Verdict:
    """Of several checks: the worst one of those that are required."""
    known = tuple(results)
    if any(result.is_fault for result in known):
        return Verdict.FAIL
    return Verdict.NOT_MEASURED if any(result.is_open for result in known) else Verdict.PASS
