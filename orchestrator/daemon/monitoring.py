"""Monitoring of the daemon: Prometheus metrics, systemd's watchdog and the line in `systemctl status`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from orchestrator.api.backend import MeasureProofs
from orchestrator.api.tickless import TicklessServer
from orchestrator.daemon.systemd import read_watchdog
from orchestrator.daemon.watchdog import Heartbeat
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.metrics.collect import Metrics, Sources
from orchestrator.metrics.counters import Counters
from orchestrator.model.disengagement import Phase
from orchestrator.model.exit_reasons import ExitReport
from orchestrator.model.exits import ReadCounters
from orchestrator.model.plan import Policy
from orchestrator.model.proof import Proof
from orchestrator.model.state import GuestState
from orchestrator.model.topology import Topology
from orchestrator.model.uplink import CounterReading, ReturnCounts

_LOOP_SECONDS = 30.0
"""The event loop normally responds within milliseconds."""
_WRITE_SECONDS = 60.0
"""A write to the ledger waits at most ten seconds for another program, and for the disk."""
_CHANGE_SECONDS = 600.0
"""A change that serves all guests includes a NIC reset and the wait for its carrier, each with a far shorter limit."""


def build_metrics(
    survey: Callable[[], Topology], ledger: Ledger, hypervisor: Hypervisor, policy: Policy, counters: Counters,
    frames: Callable[[str], Iterable[CounterReading]] = lambda _: (), hairpins: Callable[[], Mapping[str, bool]] = dict,
    exit_reports: Callable[[ReadCounters], Iterable[tuple[str, Phase, ExitReport]]] = lambda _: (),
    cache_use: Callable[[str], Mapping[str, int]] = lambda _: {},
    returns: Callable[[], Mapping[str, ReturnCounts]] = dict,
    vcpu_times: Callable[[], Iterable[tuple[str, int, float, float]]] = lambda: (),
) -> Metrics:  # fmt: skip
    """``frames``: of an uplink; the others as of `metrics.collect.Sources`."""
    sources = Sources(
        guests=lambda: ledger.read().claims,
        generation=lambda: ledger.read().generation,
        survey=survey,
        read_exits=hypervisor.read_exits,
        frames=lambda: {uplink: frames(uplink) for uplink in policy.uplinks},
        hairpins=hairpins,
        exit_reports=exit_reports,
        cache_use=cache_use,
        returns=returns,
        vcpu_times=vcpu_times,
    )
    return Metrics(sources, policy, counters)


def record_audits(audit: MeasureProofs, counters: Counters) -> MeasureProofs:
    """Wraps the audit: its proofs are recorded for the metrics, except those of an audit of the host only.

    Such an audit must not make the verdicts of guests look new.
    """

    def recorded(frames: int, *, host_only: bool) -> Iterable[Proof]:
        proofs = tuple(audit(frames, host_only=host_only))
        if not host_only:
            counters.observe_audit(proofs)
        return proofs

    return recorded


def start_heartbeat(server: TicklessServer, ledger: Ledger, check_requests: Callable[[float], object]) -> Heartbeat | None:
    """Notifies systemd's watchdog while event loop, ledger and requests make progress; None without a watchdog.

    libvirt is not checked: restarting the manager does not repair it. ``check_requests`` raises if a lock that requests need has
    been held for more than this many seconds.
    """
    seconds = read_watchdog()
    if seconds is None:
        return None
    checks: dict[str, Callable[[], object]] = {
        "server": lambda: server.check(_LOOP_SECONDS),
        "ledger": lambda: ledger.raise_if_stalled(_WRITE_SECONDS),
        "requests": lambda: check_requests(_CHANGE_SECONDS),
    }
    heartbeat = Heartbeat.for_watchdog(checks, seconds, lambda: status_line(ledger))
    heartbeat.start()
    return heartbeat


def status_line(ledger: Ledger) -> str:
    states = [claim.state for claim in ledger.read().claims]
    quarantined = states.count(GuestState.QUARANTINED)
    more = f", {quarantined} in quarantine" if quarantined else ""
    trouble = f"; guests cannot be created or started: {ledger.trouble}" if ledger.trouble else ""
    return f"{len(states)} guests, {states.count(GuestState.RUNNING)} of them running{more}{trouble}"
