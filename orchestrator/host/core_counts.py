"""Counters of a guest's CPUs, for the record of its start and for the comparison with it."""

from __future__ import annotations

import time

from orchestrator.errors import HostError
from orchestrator.host.activity import Activity, read_activity
from orchestrator.host.processes import read_boot_id, read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.switch_trace import read_switches
from orchestrator.model.core_start import CoreStart, Switches
from orchestrator.values import CpuSet


def read_core_start(host: HostRoot, pid: int, cpus: CpuSet, *, at_launch: bool) -> CoreStart:
    """Switches are read first, so that later ones cover at least the time of the other counters. Raises HostError."""
    switches = _try_switches(host, cpus)
    return _combine(host, pid, switches, read_activity(host, cpus), at_launch=at_launch)


def read_core_now(host: HostRoot, pid: int, cpus: CpuSet) -> tuple[CoreStart, Activity]:
    """As ``read_core_start``, with switches read last. Also returns the activity, which has the names of interrupts."""
    activity = read_activity(host, cpus)
    return _combine(host, pid, _try_switches(host, cpus), activity, at_launch=False), activity


def read_start_time(host: HostRoot, pid: int) -> float:
    """Of a process, in seconds after boot. Raises HostError if it has ended."""
    for thread in read_process_threads(host, pid):
        if thread.tid == pid:
            return thread.started
    raise HostError(f"process {pid} has ended")


def _try_switches(host: HostRoot, cpus: CpuSet) -> tuple[tuple[Switches, ...] | None, str]:
    try:
        return read_switches(host, cpus), ""
    except HostError as error:
        return None, error.message


def _combine(
    host: HostRoot, pid: int, switches: tuple[tuple[Switches, ...] | None, str], activity: Activity, *, at_launch: bool
) -> CoreStart:
    found, why = switches
    return CoreStart(
        read_boot_id(host), pid, read_start_time(host, pid), time.clock_gettime(time.CLOCK_BOOTTIME), at_launch,
        dict(activity.interrupts), dict(activity.softirqs), activity.slices, found, why,
    )  # fmt: skip
