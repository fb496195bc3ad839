"""Facts for the proofs core-quiet and host-isolation."""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import UUID

from orchestrator.audit.core_history import History
from orchestrator.audit.core_quiet import Sample
from orchestrator.audit.cores import read_guest_cpus
from orchestrator.audit.host_isolation import IsolationFacts
from orchestrator.errors import OrchestratorError
from orchestrator.host.activity import read_activity, read_thread_slices
from orchestrator.host.core_counts import read_core_now
from orchestrator.host.cpus import read_isolated, read_present
from orchestrator.host.irqbalance import find_irqbalance
from orchestrator.host.isolation import Division, read_settings
from orchestrator.host.processes import Thread, read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.tuned import find_tuned
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.core_start import CoreStart, Switches
from orchestrator.model.topology import Topology
from orchestrator.values import CpuSet


def read_isolation(
    host: HostRoot, housekeeping: CpuSet, guests: tuple[RunningGuest, ...], topology: Topology, threads: tuple[Thread, ...]
) -> tuple[IsolationFacts, Division]:
    used = CpuSet.of(cpu for guest in guests for cpu in read_guest_cpus(guest, topology))
    facts = IsolationFacts(read_settings(host), find_tuned(host), find_irqbalance(host, threads), read_isolated(host))
    # Not CPUs that could be plugged in, for which most servers have numbers: nothing runs there. The next audit finds new ones.
    every = read_present(host) or topology.possible or topology.cpus
    return facts, Division(housekeeping, every - housekeeping, used)


def take_first(host: HostRoot, guest: RunningGuest, cores: CpuSet, threads: tuple[Thread, ...]) -> Sample:
    """``threads``: all of the host."""
    return _take(
        host, guest, cores, tuple(thread for thread in threads if thread.last_cpu in cores or thread.allowed.meets(cores))
    )


def take_last(host: HostRoot, guest: RunningGuest, cores: CpuSet, first: Sample, window: float) -> Sample:
    """At least ``window`` seconds after the first sample, of the same threads."""
    time.sleep(max(0.0, first.time + window - time.monotonic()))
    tids, pids = {thread.tid for thread in first.threads}, {thread.pid for thread in first.threads}
    again = (thread for pid in sorted(pids) for thread in read_process_threads(host, pid))
    return _take(host, guest, cores, tuple(thread for thread in again if thread.tid in tids))


def read_history(
    host: HostRoot,
    guest: RunningGuest,
    find_start: Callable[[UUID], CoreStart | None],
    last: Callable[[], Sample],
    read_switches: Callable[[], tuple[Switches, ...]],
) -> History | str:
    """Or why it cannot be read. ``last``: the last sample of the guest's cores, which was taken before the switches are read."""
    try:
        start = find_start(guest.uuid)
        if start is None:
            return "no manager recorded the start"
        activity = last().activity
        return History(start, read_core_now(host, guest.pid, activity, read_switches), activity.names)
    except OrchestratorError as error:
        return error.message


def _take(host: HostRoot, guest: RunningGuest, cores: CpuSet, threads: tuple[Thread, ...]) -> Sample:
    ids = {(guest.pid, vcpu.tid) for vcpu in guest.vcpus} | {(thread.pid, thread.tid) for thread in threads}
    before = read_thread_slices(host, ids)
    moment, activity = time.monotonic(), read_activity(host, cores)
    return Sample(moment, activity, before, read_thread_slices(host, ids), threads)
