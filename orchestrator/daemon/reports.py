"""How the manager is watched, put together for the daemon: systemd's sockets and watchdog, and what Prometheus reads."""

from __future__ import annotations

import faulthandler
import socket
from collections.abc import Callable
from pathlib import Path

from orchestrator.api.server import open_socket
from orchestrator.api.tickless import TicklessServer
from orchestrator.daemon.journal import set_up_logging
from orchestrator.daemon.systemd import read_watchdog, take_sockets
from orchestrator.daemon.watchdog import Heartbeat
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.metrics.collect import Metrics, Sources
from orchestrator.metrics.counters import Counters
from orchestrator.model.plan import Policy
from orchestrator.model.proof import Proof
from orchestrator.model.state import GuestState
from orchestrator.model.topology import Topology

# FileDescriptorName= of nohyped.socket.
_SOCKET = "nohyped"

# Seconds. The loop answers within milliseconds; a minute is for a host that is out of memory.
_LOOP = 30.0
# A write waits at most ten seconds for another program's, and for a disk as long as that takes.
_WRITE = 60.0
# What serves all guests takes as long as a NIC's reset and its carrier, each of which has a limit of its own far below.
_CHANGE = 600.0


def set_up_reports() -> None:
    """Logs go to the journal; a fatal signal, such as that of systemd's watchdog, leaves what each thread was doing there too."""
    set_up_logging()
    faulthandler.enable()


def find_listener(path: Path) -> socket.socket:
    """The Unix socket that systemd opened for us, else one of our own.

    Raises:
        HostError: see ``open_socket``.
    """
    given = take_sockets().get(_SOCKET, [])
    return given[0] if given else open_socket(path)


def build_metrics(
    survey: Callable[[], Topology], ledger: Ledger, hypervisor: Hypervisor, policy: Policy, seen: Counters
) -> Metrics:
    """What Prometheus reads: from the ledger, the live host and KVM's counters. libvirt is asked for running guests only."""
    sources = Sources(
        guests=lambda: ledger.read().claims,
        generation=lambda: ledger.read().generation,
        survey=survey,
        read_exits=hypervisor.read_exits,
    )
    return Metrics(sources, policy, seen)


def watch_audit(audit: Callable[[int], tuple[Proof, ...]], seen: Counters) -> Callable[[int], tuple[Proof, ...]]:
    """The same audit, whose proofs are remembered for Prometheus."""

    def observed(frames: int) -> tuple[Proof, ...]:
        proofs = audit(frames)
        seen.observe_audit(proofs)
        return proofs

    return observed


def start_heartbeat(server: TicklessServer, ledger: Ledger, check_requests: Callable[[float], object]) -> Heartbeat | None:
    """Begins to tell systemd that we work; None if it does not want to know.

    Not libvirt: it may be away for as long as it likes, and a new manager would not bring it back.

    Args:
        server: its event loop must go on.
        ledger: must be readable, and a write to it must end.
        check_requests: raises if what requests need has been held up for so many seconds.
    """
    seconds = read_watchdog()
    if seconds is None:
        return None
    checks: dict[str, Callable[[], object]] = {
        "server": lambda: server.check(_LOOP),
        "ledger": lambda: ledger.check(_WRITE),
        "requests": lambda: check_requests(_CHANGE),
    }
    heartbeat = Heartbeat.for_watchdog(checks, seconds, lambda: describe(ledger))
    heartbeat.start()
    return heartbeat


def describe(ledger: Ledger) -> str:
    """The manager's line in `systemctl status`."""
    states = [claim.state for claim in ledger.read().claims]
    quarantined = states.count(GuestState.QUARANTINED)
    more = f", {quarantined} in quarantine" if quarantined else ""
    trouble = f"; guests cannot be created or started: {ledger.trouble}" if ledger.trouble else ""
    return f"{len(states)} guests, {states.count(GuestState.RUNNING)} of them running{more}{trouble}"
