"""All metrics: one row per metric."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """https://prometheus.io/docs/concepts/metric_types/"""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    name: str  # ends with the unit, and the name of a counter with _total
    kind: Kind
    unit: str  # "seconds", "bytes", or empty for a plain number
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()  # upper bounds of a histogram's buckets; the last bucket has no bound


_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_SLOW = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

METRICS: tuple[Metric, ...] = (
    Metric("nohype_guests", Kind.GAUGE, "", ("state",), "Guests that have a claim, by state."),
    Metric("nohype_guest_restarts_total", Kind.COUNTER, "", ("guest",), "Automatic restarts since the last requested start."),
    Metric("nohype_cores", Kind.GAUGE, "", ("node", "state"), "Whole physical cores, by use."),
    Metric("nohype_huge_pages", Kind.GAUGE, "", ("node", "size", "state"), "Huge pages, by use."),
    Metric("nohype_vfs", Kind.GAUGE, "", ("uplink", "state"), "VFs by use, including VFs that are not created yet."),
    Metric("nohype_claim_seconds", Kind.HISTOGRAM, "seconds", ("outcome",), "Time to plan and to claim.", _QUICK),
    Metric("nohype_start_seconds", Kind.HISTOGRAM, "seconds", ("outcome",), "Time from claim to running vCPUs.", _SLOW),
    Metric("nohype_proofs", Kind.GAUGE, "", ("proof", "verdict"), "Proofs of the last audit."),
    Metric("nohype_audit_age_seconds", Kind.GAUGE, "seconds", (), "Time since the end of the last audit; +Inf without an audit."),
    Metric("nohype_guest_exits_total", Kind.COUNTER, "", ("guest", "class"), "VM exits of all vCPUs since the guest started."),
    Metric(
        "nohype_guest_exit_reasons_total",
        Kind.COUNTER,
        "",
        ("guest", "vcpu", "reason", "phase"),
        "VM exits by hardware reason, during the guest's boot and after it; left out where they are not counted.",
    ),
    Metric(
        "nohype_guest_vcpu_seconds_total",
        Kind.COUNTER,
        "seconds",
        ("guest", "vcpu"),
        "Time that a vCPU has run since the guest started, in the guest and in KVM.",
    ),
    Metric(
        "nohype_guest_vcpu_wait_seconds_total",
        Kind.COUNTER,
        "seconds",
        ("guest", "vcpu"),
        "Time that a vCPU was ready to run while its CPU ran another thread.",
    ),
    Metric("nohype_guest_cache_bytes", Kind.GAUGE, "bytes", ("guest",), "L3 cache that a guest with a part of its own fills."),
    Metric(
        "nohype_guest_memory_traffic_bytes_total",
        Kind.COUNTER,
        "bytes",
        ("guest",),
        "Bytes between such a guest's cores and memory.",
    ),
    Metric(
        "nohype_guest_memory_traffic_local_bytes_total",
        Kind.COUNTER,
        "bytes",
        ("guest",),
        "The part with memory of the same node.",
    ),
    Metric("nohype_undo_failures_total", Kind.COUNTER, "", (), "Cleanups of guests that failed or could not be verified."),
    Metric("nohype_disks", Kind.GAUGE, "", ("kind", "state"), "Disks of guests, and other NVMe controllers, by use."),
    Metric("nohype_disk_wipes_total", Kind.COUNTER, "", ("outcome",), "Wipes of the disks of deleted guests, by guest."),
    Metric("nohype_disk_wiped_bytes_total", Kind.COUNTER, "bytes", (), "Bytes of disks that were wiped and verified clean."),
    Metric(
        "nohype_frames_total",
        Kind.COUNTER,
        "",
        ("uplink", "place", "interface", "guest", "direction"),
        "Frames of guests' NICs, uplinks and switch ports; sent is towards the switch.",
    ),
    Metric(
        "nohype_frame_bytes_total",
        Kind.COUNTER,
        "bytes",
        ("uplink", "place", "interface", "guest", "direction"),
        "Bytes of these frames.",
    ),
    Metric(
        "nohype_frames_dropped_total",
        Kind.COUNTER,
        "",
        ("uplink", "place", "interface", "guest", "direction"),
        "Frames that these interfaces dropped.",
    ),
    Metric(
        "nohype_returning_frames_total",
        Kind.COUNTER,
        "",
        ("uplink", "count"),
        "Frames between guests of software edges that must return, and that returned. From 0 after a change of guests.",
    ),
    Metric("nohype_hairpin_lost", Kind.GAUGE, "", ("uplink",), "1 while frames between guests do not return from the switch."),
    Metric("nohype_claims_total", Kind.COUNTER, "", (), "Claims since the ledger was created."),
    Metric("nohype_scrape_failures_total", Kind.COUNTER, "", ("source",), "Scrapes for which a source could not be read."),
)

BUCKETS = {metric.name: metric.buckets for metric in METRICS if metric.kind is Kind.HISTOGRAM}


class Outcome(StrEnum):
    """Result of a claim or a start, a label of the histograms."""

    OK = "ok"
    REFUSED = "refused"
    """No room, over quota, or an invalid request."""
    FAILED = "failed"


Sample = tuple[str, tuple[str, ...], float]
"""Name of a metric, values of its labels in the declared order, and the value."""
