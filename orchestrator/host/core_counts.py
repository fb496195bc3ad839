"""Counters of a guest's CPUs, for the record of its start and for the comparison with it."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.errors import HostError
from orchestrator.host.activity import Activity, read_activity
from orchestrator.host.processes import read_boot_id, read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.switch_trace import read_switches, sum_switches
from orchestrator.model.core_start import CoreStart, Switches
from orchestrator.values import CpuSet


def read_core_start(host: HostRoot, pid: int, cpus: CpuSet, *, at_launch: bool) -> CoreStart:
    """Switches are read first, so that later ones cover at least the time of the other counters. Raises HostError."""
    switches, why = _try_switches(lambda: sum_switches(read_switches(host), cpus))
    return _combine(host, pid, switches, why, read_activity(host, cpus), at_launch=at_launch)


def read_core_now(host: HostRoot, pid: int, activity: Activity, read: Callable[[], tuple[Switches, ...]]) -> CoreStart:
    """``read`` is called after ``activity`` was read: see ``read_core_start``."""
    switches, why = _try_switches(read)
    return _combine(host, pid, switches, why, activity, at_launch=False)


def _try_switches(read: Callable[[], tuple[Switches, ...]]) -> tuple[tuple[Switches, ...] | None, str]:
    """None, and why they cannot be read."""
    try:
        return read(), ""
    except HostError as error:
        return None, error.message


def read_start_time(host: HostRoot, pid: int) -> float:
    """Of a process, in seconds after boot. Raises HostError if it has ended."""
    for thread in read_process_threads(host, pid):
        if thread.tid == pid:
            return thread.started
    raise HostError(f"process {pid} has ended")


def _combine(
    host: HostRoot, pid: int, switches: tuple[Switches, ...] | None, why: str, activity: Activity, *, at_launch: bool
) -> CoreStart:
    return CoreStart(
        read_boot_id(host), pid, read_start_time(host, pid), time.clock_gettime(time.CLOCK_BOOTTIME), at_launch,
        dict(activity.interrupts), dict(activity.softirqs), activity.slices, switches, why,
    )  # fmt: skip
