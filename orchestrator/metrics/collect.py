"""The Prometheus page: samples are read at each scrape.

A source that fails is counted and its samples are left out, never replaced by 0; the samples of the other sources are kept.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from orchestrator.errors import NotFound
from orchestrator.metrics.counters import Counters
from orchestrator.metrics.declare import METRICS, Kind, Metric, Sample
from orchestrator.model.disengagement import Phase
from orchestrator.model.exit_reasons import ExitReport
from orchestrator.model.exits import ReadCounters, add_vcpus, classify
from orchestrator.model.plan import Plan, Policy
from orchestrator.model.state import GuestState
from orchestrator.model.topology import Topology
from orchestrator.model.uplink import CounterReading, ReturnCounts
from orchestrator.planning.capacity import count_cores, count_disks, count_pages, count_vfs

_log = logging.getLogger(__name__)

# Seconds. A survey of a large host reads thousands of files, and only the pools in it change while no guest changes its state:
# scrapes share one survey for this long, unless a guest was created, deleted or changed its state.
_SURVEY_AGE = 60.0


# Documentation/arch/x86/resctrl.rst, section "mon_data"
_CACHE_COUNTERS = {
    "llc_occupancy": "nohype_guest_cache_bytes",
    "mbm_total_bytes": "nohype_guest_memory_traffic_bytes_total",
    "mbm_local_bytes": "nohype_guest_memory_traffic_local_bytes_total",
}

# What generate_latest() writes (https://prometheus.io/docs/instrumenting/exposition_formats/).
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Guest(Protocol):
    """The attributes of a guest that are read."""

    @property
    def plan(self) -> Plan: ...

    @property
    def state(self) -> str: ...

    @property
    def restarted(self) -> int: ...


@dataclass(frozen=True)
class Sources:
    """The sources of the samples. Each may raise any exception."""

    guests: Callable[[], Iterable[Guest]]  # all guests that have a claim
    generation: Callable[[], int]  # number of claims since the ledger was created
    survey: Callable[[], Topology]
    # QEMU before its patch "kvm: reuse per-vcpu stats fd to avoid vcpu interruption" (June 2023) stops the vCPU for each reading.
    read_exits: ReadCounters
    # Of all running guests, by name and phase; it reads the counters by the given function.
    exit_reports: Callable[[ReadCounters], Iterable[tuple[str, Phase, ExitReport]]]
    frames: Callable[[], Mapping[str, Iterable[CounterReading]]] = dict  # by uplink
    hairpins: Callable[[], Mapping[str, bool]] = dict  # by watched uplink: frames do not return
    returns: Callable[[], Mapping[str, ReturnCounts]] = dict  # by uplink with software edges
    cache_use: Callable[[str], Mapping[str, int]] = lambda _: {}  # of a guest, as of `host.cache.read_use`
    # Guest, vCPU, and the seconds since its start that it ran and that it waited for its CPU; of running guests.
    vcpu_times: Callable[[], Iterable[tuple[str, int, float, float]]] = lambda: ()


class Metrics:
    """Renders the page that Prometheus reads."""

    def __init__(self, sources: Sources, policy: Policy, counters: Counters) -> None:
        self._sources, self._policy, self._counters = sources, policy, counters
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._lock = threading.Lock()
        self._survey: tuple[float, Hashable, Topology] | None = None
        self._exits: dict[UUID, tuple[Mapping[str, int], ...]] = {}  # of this scrape

    def render(self) -> tuple[bytes, str]:
        """The page and its content type. Errors of sources are not raised."""
        # One scrape at a time: concurrent scrapes would read the same sources again.
        with self._lock:
            return generate_latest(self._registry), _TEXT

    def collect(self) -> Iterator[Family]:
        """For prometheus-client: all declared metrics, in their order, with the samples that could be read."""
        self._exits.clear()
        samples: dict[str, list[Sample]] = {metric.name: [] for metric in METRICS}
        for source, read in self._readers().items():
            for sample in self._try(source, read):
                samples[sample[0]].append(sample)
        for sample in (*self._counters.samples(), *self._counters.failed_sources(self._readers())):
            samples[sample[0]].append(sample)
        for metric in METRICS:
            yield self._build(metric, samples[metric.name])

    def _build(self, metric: Metric, samples: list[Sample]) -> Family:
        if metric.kind is Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, buckets, total in self._counters.histograms(metric.name):
                histogram.add_metric(labels, buckets, total)
            return histogram
        family = (CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily)(
            metric.name, metric.help, labels=metric.labels
        )
        for _, labels, value in samples:
            family.add_metric(labels, value)
        return family

    def _readers(self) -> dict[str, Callable[[], Iterator[Sample]]]:
        return {
            "guests": self._read_guests, "ledger": self._read_ledger, "survey": self._read_host,
            # The reasons first: they must not be ahead of the counters, which are read once for both.
            "exit reasons": self._read_exit_reasons, "exits": self._read_exits, "frames": self._read_frames,
            "caches": self._read_caches, "vCPU times": self._read_vcpu_times,
        }  # fmt: skip

    def _try(self, source: str, read: Callable[[], Iterator[Sample]]) -> list[Sample]:
        try:
            return list(read())
        except Exception as error:
            # Of any kind: the page is needed most when something is wrong.
            _log.warning("metrics without %s: %s", source, error)
            self._counters.count_failed_source(source)
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
        # The pages of a quarantined guest are most likely back in the pool; pages that are missing there are counted as foreign.
        idle = (GuestState.STOPPED, GuestState.QUARANTINED)
        started = {guest.plan.name for guest in guests if guest.state not in idle}
        for (node, use), count in count_cores(topology, plans, quarantined, self._policy).items():
            yield "nohype_cores", (str(node), use), count
        for (node, size, use), count in count_pages(topology, plans, quarantined, started, self._policy).items():
            yield "nohype_huge_pages", (str(node), str(size), use), count
        states = {str(guest.plan.name): str(guest.state) for guest in guests}
        for (kind, state), count in count_disks(topology, plans, states).items():
            yield "nohype_disks", (kind, state), count
        for (uplink, use), count in count_vfs(topology, plans, quarantined, self._policy).items():
            yield "nohype_vfs", (uplink, use), count

    def _read_survey(self, guests: Hashable) -> Topology:
        now = self._counters.clock()
        if self._survey is None or self._survey[1] != guests or now - self._survey[0] > _SURVEY_AGE:
            self._survey = (now, guests, self._sources.survey())
        return self._survey[2]

    def _read_frames(self) -> Iterator[Sample]:
        for uplink, readings in self._sources.frames().items():
            for reading in readings:
                if counts := reading.counts:
                    labels = (uplink, str(reading.place), reading.name, reading.guest)
                    for way, frames, size, dropped in (
                        ("sent", counts.sent, counts.sent_bytes, counts.sent_dropped),
                        ("received", counts.received, counts.received_bytes, counts.received_dropped),
                    ):
                        yield "nohype_frames_total", (*labels, way), frames
                        yield "nohype_frame_bytes_total", (*labels, way), size
                        yield "nohype_frames_dropped_total", (*labels, way), dropped
        for uplink, is_lost in self._sources.hairpins().items():
            yield "nohype_hairpin_lost", (uplink,), int(is_lost)
        for uplink, found in self._sources.returns().items():
            yield "nohype_returning_frames_total", (uplink, "must-return"), found.must_return
            yield "nohype_returning_frames_total", (uplink, "returned"), found.returned

    def _read_exits(self) -> Iterator[Sample]:
        for guest in self._sources.guests():
            if guest.state == GuestState.RUNNING:
                try:
                    vcpus = self._read_counters(guest.plan.uuid)
                except NotFound:
                    continue  # the guest has ended in the meantime
                for name, count in classify(add_vcpus(vcpus)).items():
                    yield "nohype_guest_exits_total", (guest.plan.name, name), count

    def _read_counters(self, uuid: UUID) -> tuple[Mapping[str, int], ...]:
        if uuid not in self._exits:
            self._exits[uuid] = self._sources.read_exits(uuid)
        return self._exits[uuid]

    def _read_caches(self) -> Iterator[Sample]:
        for guest in self._sources.guests():
            if guest.state == GuestState.RUNNING and guest.plan.caches and not guest.plan.caches.waived:
                for counter, value in self._sources.cache_use(guest.plan.name).items():
                    if counter in _CACHE_COUNTERS:
                        yield _CACHE_COUNTERS[counter], (guest.plan.name,), value

    def _read_vcpu_times(self) -> Iterator[Sample]:
        for guest, vcpu, ran, waited in self._sources.vcpu_times():
            yield "nohype_guest_vcpu_seconds_total", (guest, str(vcpu)), ran
            yield "nohype_guest_vcpu_wait_seconds_total", (guest, str(vcpu)), waited

    def _read_exit_reasons(self) -> Iterator[Sample]:
        for guest, phase, report in self._sources.exit_reports(self._read_counters):
            for index, vcpu in enumerate(report.vcpus):
                for reason, count in (vcpu.reasons or {}).items():
                    yield "nohype_guest_exit_reasons_total", (guest, str(index), reason, str(phase)), count
