"""Compares evidence, whose signature was verified, with what its reader expects: host, boot, request and time. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.evidence.document import EvidenceError, Rejected

FAILED = 1
NOT_MEASURED = 8
"""Exit statuses of authentic evidence: a proof fails; none fails, but not all were measured."""

_MAX_AHEAD = 60.0
"""Seconds by which clocks of two machines may differ."""


@dataclass(frozen=True)
class Expected:
    """None: not compared. An empty text is: a script whose variable is not set must not accept each host."""

    host: str | None = None
    boot: str | None = None
    nonce: str | None = None
    max_age: float | None = None  # seconds
    any_clock: bool = False  # accept the time of a clock that was not synchronised


def check_expected(evidence: Mapping[str, Any], expected: Expected, now: datetime) -> None:
    """Raises EvidenceError for the first difference."""
    host = evidence["host"]
    for what, wanted, found in (("host", expected.host, host.get("id")), ("boot", expected.boot, host.get("boot"))):
        if wanted is not None and wanted != found:
            message = f"the evidence is of another {what}: {found!s:.64}, expected {wanted or 'an empty id'}"
            raise EvidenceError(Rejected.OTHER, message, "ask that host for evidence")
    if expected.nonce is not None and evidence["nonce"] != expected.nonce:
        message = f"the evidence has the nonce {evidence['nonce']!r:.80}, expected {expected.nonce!r}"
        raise EvidenceError(Rejected.OTHER, message, "it answers another request: ask for evidence with your own --nonce")
    _check_time(evidence, expected, now)


def _check_time(evidence: Mapping[str, Any], expected: Expected, now: datetime) -> None:
    synchronised = evidence["clock"].get("synchronised")
    if synchronised is not True and not expected.any_clock:
        state = "not synchronised" if synchronised is False else "not measured"
        message = f"the clock of the host was {state}: the time {evidence['created']!s:.40} of the evidence is not reliable"
        raise EvidenceError(Rejected.TIME, message, "synchronise the clock of the host, or accept it with --any-clock")
    if expected.max_age is None:
        return
    try:
        created = datetime.fromisoformat(evidence["created"])
        age = (now - created.astimezone(UTC)).total_seconds()
    except (ValueError, OverflowError):
        message = f"the time of the evidence cannot be read: {evidence['created']!r:.80}"
        raise EvidenceError(Rejected.TIME, message) from None
    if created.tzinfo is None:
        raise EvidenceError(Rejected.TIME, f"the time of the evidence has no time zone: {evidence['created']!r:.80}")
    if age > expected.max_age:
        message = f"the evidence is {age:.0f} s old, limit {expected.max_age:g} s"
        raise EvidenceError(Rejected.TIME, message, "ask the host for new evidence")
    if age < -_MAX_AHEAD:
        message = f"the evidence is dated {-age:.0f} s in the future"
        raise EvidenceError(Rejected.TIME, message, "compare the clocks of host and reader")


@dataclass(frozen=True)
class Summary:
    """``problems``: what makes evidence worse than its proofs say, such as a broken event log."""

    counts: Mapping[str, int]  # by verdict
    problems: tuple[str, ...]

    @property
    def status(self) -> int:
        """0 only if every proof passed and the event log is intact."""
        if self.counts["fail"] or self.problems:
            return FAILED
        return NOT_MEASURED if self.counts["not measured"] or not self.counts["pass"] else 0

    def __str__(self) -> str:
        return f"{self.counts['pass']} pass, {self.counts['fail']} fail, {self.counts['not measured']} not measured"


def summarize(evidence: Mapping[str, Any]) -> Summary:
    counts = Counter(proof["verdict"] for proof in evidence["proofs"])
    faults = evidence["events"].get("faults", ["the event log was not verified"])
    problems = tuple(f"event log: {fault}" for fault in faults) if isinstance(faults, list) else ("event log: cannot be read",)
    return Summary(counts, problems)
