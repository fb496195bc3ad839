"""What Prometheus is told. All metrics are declared in one table; figures are read when asked for, and nothing is stopped for it.

A source that fails leaves its figures out (never a 0 that was not read) and is counted; the others are given all the same.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from orchestrator.errors import NotFound
from orchestrator.model.event import Event, EventKind
from orchestrator.model.exits import add_vcpus, classify
from orchestrator.model.plan import Plan, Policy
from orchestrator.model.proof import Proof, Verdict
from orchestrator.model.state import GuestState
from orchestrator.model.topology import Topology
from orchestrator.planning.capacity import count_cores, count_pages, count_vfs

_log = logging.getLogger(__name__)

# Nothing in a survey changes by itself but pools, and a survey of a large host reads thousands of files: it is not read anew for
# each of several scrapers, but whenever guests have come, gone, or changed their state.
_SURVEY_AGE = 60.0


# What generate_latest() writes (https://prometheus.io/docs/instrumenting/exposition_formats/).
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Kind(StrEnum):
    """What a figure is (https://prometheus.io/docs/concepts/metric_types/)."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """A metric as it is declared.

    Attributes:
        name: as Prometheus sees it; ends with the unit, and for a counter with ``_total``.
        unit: "seconds", or empty for a plain number.
        labels: names of the labels.
        buckets: upper bounds of a histogram's buckets, the last of them left out: it has none.
    """

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_SLOW = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

METRICS: tuple[Metric, ...] = (
    Metric("nohype_guests", Kind.GAUGE, "", ("state",), "Guests that hold a claim, by state."),
    Metric("nohype_guest_restarts_total", Kind.COUNTER, "", ("guest",), "Restarts of a guest since somebody last started it."),
    Metric("nohype_cores", Kind.GAUGE, "", ("node", "state"), "Whole physical cores, by what they are for."),
    Metric("nohype_huge_pages", Kind.GAUGE, "", ("node", "size", "state"), "Huge pages, by what they are for."),
    Metric("nohype_vfs", Kind.GAUGE, "", ("uplink", "state"), "Virtual functions, those yet to be made included."),
    Metric("nohype_claim_seconds", Kind.HISTOGRAM, "seconds", ("outcome",), "Time to plan and to claim.", _QUICK),
    Metric("nohype_start_seconds", Kind.HISTOGRAM, "seconds", ("outcome",), "Time from claim to running vCPUs.", _SLOW),
    Metric("nohype_proofs", Kind.GAUGE, "", ("proof", "verdict"), "Proofs of the last audit."),
    Metric("nohype_audit_age_seconds", Kind.GAUGE, "seconds", (), "Time since the last audit ended; +Inf if there was none."),
    Metric("nohype_guest_exits_total", Kind.COUNTER, "", ("guest", "class"), "VM exits of all vCPUs since the guest started."),
    Metric("nohype_undo_failures_total", Kind.COUNTER, "", (), "Times that not all could be undone, or verified, after a guest."),
    Metric("nohype_claims_total", Kind.COUNTER, "", (), "Claims since the ledger was made."),
    Metric("nohype_scrape_failures_total", Kind.COUNTER, "", ("source",), "Sources that could not be read for this page."),
)


class Outcome(StrEnum):
    """How a claim or a start went."""

    OK = "ok"
    REFUSED = "refused"
    """No room, over quota, a wrong request: an answer, not a fault."""
    FAILED = "failed"


_TIMED = {
    EventKind.CLAIMED: ("nohype_claim_seconds", Outcome.OK),
    EventKind.REFUSED: ("nohype_claim_seconds", Outcome.REFUSED),
    EventKind.PLAN_FAILED: ("nohype_claim_seconds", Outcome.FAILED),
    EventKind.STARTED: ("nohype_start_seconds", Outcome.OK),
    EventKind.FAILED: ("nohype_start_seconds", Outcome.FAILED),
}
"""Kind of event → the histogram that its duration belongs to, and the outcome."""


class Guest(Protocol):
    """What is asked of a guest: the ledger's claims and the manager's views have it."""

    @property
    def plan(self) -> Plan:
        """What it owns."""

    @property
    def state(self) -> str:
        """How far it has come."""

    @property
    def restarted(self) -> int:
        """How often it was started again."""


@dataclass(frozen=True)
class Sources:
    """What is read at each scrape. Each may raise anything.

    Attributes:
        guests: all guests that hold a claim.
        generation: of the ledger.
        survey: the host.
        read_exits: KVM's counters of a running guest by its id, one mapping a vCPU. QEMU reads them without stopping the vCPU
            since its patch "kvm: reuse per-vcpu stats fd to avoid vcpu interruption" (June 2023); before, each reading made one.
    """

    guests: Callable[[], Iterable[Guest]]
    generation: Callable[[], int]
    survey: Callable[[], Topology]
    read_exits: Callable[[UUID], tuple[Mapping[str, int], ...]]


Sample = tuple[str, tuple[str, ...], float]
"""Name of a metric, values of its labels in the declared order, figure."""


@dataclass
class _Histogram:
    """How many observations fell into each bucket, and their sum."""

    counts: list[int]
    sum: float = 0.0


@dataclass
class Observations:
    """What is counted when it happens, by any thread."""

    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _histograms: dict[tuple[str, str], _Histogram] = field(default_factory=dict)
    _undo_failures: int = 0
    _failures: Counter[str] = field(default_factory=Counter)
    _audit: tuple[float, tuple[Proof, ...]] | None = None

    def observe_claim(self, seconds: float, outcome: Outcome = Outcome.OK) -> None:
        """A request was planned and claimed, or refused, in so many seconds."""
        self._observe("nohype_claim_seconds", outcome, seconds)

    def observe_refusal(self, kind: str, seconds: float) -> None:
        """See ``lifecycle.observer``: an answer that is not in the event log."""
        self._observe(*_TIMED[EventKind(kind)], seconds)

    def observe_start(self, seconds: float, outcome: Outcome = Outcome.OK) -> None:
        """A guest was started, or could not be, in so many seconds."""
        self._observe("nohype_start_seconds", outcome, seconds)

    def observe_event(self, event: Event) -> None:
        """Something has happened that the ledger has logged: claims and starts are counted from it."""
        if event.took is not None and event.kind in _TIMED:
            self._observe(*_TIMED[EventKind(event.kind)], event.took)

    def observe_audit(self, proofs: Iterable[Proof]) -> None:
        """An audit has ended with these proofs."""
        with self._lock:
            self._audit = (self.clock(), tuple(proofs))

    def count_undo_failure(self) -> None:
        """See ``lifecycle.observer``."""
        with self._lock:
            self._undo_failures += 1

    def count_failed_source(self, source: str) -> None:
        """A source could not be read for a scrape."""
        with self._lock:
            self._failures[source] += 1

    def histograms(self, name: str) -> Iterator[tuple[tuple[str, ...], list[tuple[str, float]], float]]:
        """Labels, cumulative buckets and sum of a histogram, an outcome at a time."""
        bounds = [*next(metric.buckets for metric in METRICS if metric.name == name), math.inf]
        with self._lock:
            for outcome in Outcome:
                found = self._histograms.get((name, outcome)) or _Histogram([0] * len(bounds))
                pairs = [(_bound(bound), float(sum(found.counts[: index + 1]))) for index, bound in enumerate(bounds)]
                yield (str(outcome),), pairs, found.sum

    def samples(self) -> Iterator[Sample]:
        """Everything but the histograms and the failed sources."""
        with self._lock:
            audit, failures = self._audit, self._undo_failures
        yield "nohype_undo_failures_total", (), failures
        yield "nohype_audit_age_seconds", (), math.inf if audit is None else self.clock() - audit[0]
        verdicts = Counter((proof.name, proof.verdict) for proof in audit[1]) if audit else Counter()
        for name in sorted({name for name, _ in verdicts}):
            # A verdict that no proof has is a 0 that was counted: graphs and alarms need it.
            for verdict in Verdict:
                yield "nohype_proofs", (name, str(verdict)), verdicts[name, verdict]

    def failed_sources(self, sources: Iterable[str]) -> Iterator[Sample]:
        """How often each source could not be read."""
        with self._lock:
            counts = Counter(self._failures)
        for source in sources:
            yield "nohype_scrape_failures_total", (source,), counts[source]

    def _observe(self, name: str, outcome: Outcome, seconds: float) -> None:
        buckets = next(metric.buckets for metric in METRICS if metric.name == name)
        with self._lock:
            found = self._histograms.setdefault((name, outcome), _Histogram([0] * (len(buckets) + 1)))
            found.counts[bisect_left(buckets, seconds)] += 1
            found.sum += seconds


class Metrics:
    """Makes the page that Prometheus reads.

    Args:
        sources: what is read for it.
        policy: how the host is divided.
        seen: what was counted since the manager started.
    """

    def __init__(self, sources: Sources, policy: Policy, seen: Observations) -> None:
        self._sources, self._policy, self._seen = sources, policy, seen
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._lock = threading.Lock()
        self._survey: tuple[float, Hashable, Topology] | None = None

    def render(self) -> tuple[bytes, str]:
        """The page and its content type. Raises nothing on account of a source."""
        # One at a time: several scrapers would else read the same things several times over.
        with self._lock:
            return generate_latest(self._registry), _TEXT

    def collect(self) -> Iterator[Family]:
        """For prometheus-client: all declared metrics, in their order, with the samples that could be had."""
        samples: dict[str, list[Sample]] = {metric.name: [] for metric in METRICS}
        for source, read in self._readers().items():
            for sample in self._try(source, read):
                samples[sample[0]].append(sample)
        for sample in (*self._seen.samples(), *self._seen.failed_sources(self._readers())):
            samples[sample[0]].append(sample)
        for metric in METRICS:
            yield self._build(metric, samples[metric.name])

    def _build(self, metric: Metric, samples: list[Sample]) -> Family:
        if metric.kind is Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, buckets, total in self._seen.histograms(metric.name):
                histogram.add_metric(labels, buckets, total)
            return histogram
        family = (CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily)(
            metric.name, metric.help, labels=metric.labels
        )
        for _, labels, figure in samples:
            family.add_metric(labels, figure)
        return family

    def _readers(self) -> dict[str, Callable[[], Iterator[Sample]]]:
        return {"guests": self._read_guests, "ledger": self._read_ledger, "survey": self._read_host, "exits": self._read_exits}

    def _try(self, source: str, read: Callable[[], Iterator[Sample]]) -> list[Sample]:
        """All samples of a source, or none."""
        try:
            return list(read())
        except Exception as error:
            # Whatever it is: the page must say what it can, above all when something is wrong.
            _log.warning("metrics without %s: %s", source, error)
            self._seen.count_failed_source(source)
            return []

    def _read_guests(self) -> Iterator[Sample]:
        guests = tuple(self._sources.guests())
        states = Counter(str(guest.state) for guest in guests)
        for state in sorted({*map(str, GuestState), *states}):
            yield "nohype_guests", (state,), states[state]
        for guest in guests:
            yield "nohype_guest_restarts_total", (guest.plan.name,), guest.restarted

    def _read_ledger(self) -> Iterator[Sample]:
        yield "nohype_claims_total", (), self._sources.generation()

    def _read_host(self) -> Iterator[Sample]:
        guests = tuple(self._sources.guests())
        topology = self._read_survey(tuple((guest.plan.uuid, guest.state) for guest in guests))
        plans = {str(guest.plan.name): guest.plan for guest in guests}
        quarantined = {guest.plan.name for guest in guests if guest.state == GuestState.QUARANTINED}
        # Of one in quarantine the pool has most likely all pages back; what it lacks all the same nobody of ours has.
        idle = (GuestState.STOPPED, GuestState.QUARANTINED)
        started = {guest.plan.name for guest in guests if guest.state not in idle}
        for (node, use), count in count_cores(topology, plans, quarantined, self._policy).items():
            yield "nohype_cores", (str(node), use), count
        for (node, size, use), count in count_pages(topology, plans, quarantined, started, self._policy).items():
            yield "nohype_huge_pages", (str(node), str(size), use), count
        for (uplink, use), count in count_vfs(topology, plans, quarantined, self._policy).items():
            yield "nohype_vfs", (uplink, use), count

    def _read_survey(self, guests: Hashable) -> Topology:
        now = self._seen.clock()
        if self._survey is None or self._survey[1] != guests or now - self._survey[0] > _SURVEY_AGE:
            self._survey = (now, guests, self._sources.survey())
        return self._survey[2]

    def _read_exits(self) -> Iterator[Sample]:
        for guest in self._sources.guests():
            if guest.state == GuestState.RUNNING:
                try:
                    vcpus = self._sources.read_exits(guest.plan.uuid)
                except NotFound:
                    continue  # it has ended just now
                for name, count in classify(add_vcpus(vcpus)).items():
                    yield "nohype_guest_exits_total", (guest.plan.name, name), count


def _bound(bound: float) -> str:
    return "+Inf" if bound == math.inf else str(bound)
