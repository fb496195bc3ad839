"""Values that are counted when something happens, by any thread, since the manager started."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from orchestrator.metrics.declare import BUCKETS, Outcome, Sample
from orchestrator.model.event import Event, EventKind
from orchestrator.model.proof import Proof, Verdict

_TIMED = {
    EventKind.CLAIMED: ("nohype_claim_seconds", Outcome.OK),
    EventKind.REFUSED: ("nohype_claim_seconds", Outcome.REFUSED),
    EventKind.PLAN_FAILED: ("nohype_claim_seconds", Outcome.FAILED),
    EventKind.STARTED: ("nohype_start_seconds", Outcome.OK),
    EventKind.FAILED: ("nohype_start_seconds", Outcome.FAILED),
}
"""Kind of event → the histogram that its duration belongs to, and the outcome."""


@dataclass
class _Histogram:
    counts: list[int]  # per bucket
    sum: float = 0.0


@dataclass
class Counters:
    """Counted values; ``clock`` is monotonic, in seconds."""

    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _histograms: dict[tuple[str, str], _Histogram] = field(default_factory=dict)
    _undo_failures: int = 0
    _wipes: Counter[str] = field(default_factory=Counter)
    _wiped_bytes: int = 0
    _failed_sources: Counter[str] = field(default_factory=Counter)
    _audit: tuple[float, tuple[Proof, ...]] | None = None

    def observe_refusal(self, kind: str, seconds: float) -> None:
        """Counts a refusal that is not in the event log."""
        self._observe(*_TIMED[EventKind(kind)], seconds)

    def observe_event(self, event: Event) -> None:
        """Counts a claim or a start that the ledger has logged."""
        if event.took is not None and event.kind in _TIMED:
            self._observe(*_TIMED[EventKind(event.kind)], event.took)

    def observe_audit(self, proofs: Iterable[Proof]) -> None:
        with self._lock:
            self._audit = (self.clock(), tuple(proofs))

    def count_undo_failure(self) -> None:
        with self._lock:
            self._undo_failures += 1

    def count_wipe(self, size: int, *, is_clean: bool) -> None:
        """``size`` in bytes, of all disks of a guest together."""
        with self._lock:
            self._wipes[Outcome.OK if is_clean else Outcome.FAILED] += 1
            self._wiped_bytes += size if is_clean else 0

    def count_failed_source(self, source: str) -> None:
        with self._lock:
            self._failed_sources[source] += 1

    def histograms(self, name: str) -> Iterator[tuple[tuple[str, ...], list[tuple[str, float]], float]]:
        """Labels, cumulative buckets and sum of a histogram, for each outcome."""
        bounds = [*BUCKETS[name], math.inf]
        with self._lock:
            for outcome in Outcome:
                histogram = self._histograms.get((name, outcome)) or _Histogram([0] * len(bounds))
                pairs = [(_format(bound), float(sum(histogram.counts[: index + 1]))) for index, bound in enumerate(bounds)]
                yield (str(outcome),), pairs, histogram.sum

    def samples(self) -> Iterator[Sample]:
        """All samples except histograms and failed sources."""
        with self._lock:
            audit, undo_failures = self._audit, self._undo_failures
            wipes, wiped_bytes = Counter(self._wipes), self._wiped_bytes
        yield "nohype_undo_failures_total", (), undo_failures
        for outcome in (Outcome.OK, Outcome.FAILED):
            yield "nohype_disk_wipes_total", (str(outcome),), wipes[outcome]
        yield "nohype_disk_wiped_bytes_total", (), wiped_bytes
        yield "nohype_audit_age_seconds", (), math.inf if audit is None else self.clock() - audit[0]
        verdicts = Counter((proof.name, proof.verdict) for proof in audit[1]) if audit else Counter()
        for name in sorted({name for name, _ in verdicts}):
            # Also verdicts that no proof has: graphs and alerts need a 0.
            for verdict in Verdict:
                yield "nohype_proofs", (name, str(verdict)), verdicts[name, verdict]

    def failed_sources(self, sources: Iterable[str]) -> Iterator[Sample]:
        with self._lock:
            counts = Counter(self._failed_sources)
        for source in sources:
            yield "nohype_scrape_failures_total", (source,), counts[source]

    def _observe(self, name: str, outcome: Outcome, seconds: float) -> None:
        with self._lock:
            histogram = self._histograms.setdefault((name, outcome), _Histogram([0] * (len(BUCKETS[name]) + 1)))
            histogram.counts[bisect_left(BUCKETS[name], seconds)] += 1
            histogram.sum += seconds


def _format(bound: float) -> str:
    return "+Inf" if bound == math.inf else str(bound)
