"""Which threads the scheduler has switched to on guest CPUs: a histogram on sched:sched_switch (see `host.histogram`).

The scheduler hits the tracepoint where it counts a time slice of the CPU in /proc/schedstat (kernel/sched/core.c, __schedule;
kernel/sched/stats.h, sched_info_switch). Unlike that number, the histogram names threads that have ended or moved since.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from orchestrator.errors import HostError
from orchestrator.host.histogram import INSTANCE, Histogram, begin_counter, read_histogram
from orchestrator.host.root import HostRoot
from orchestrator.model.core_start import Switches
from orchestrator.values import CpuSet

_KEYS = "next_comm,common_cpu,next_pid"
_SIZE = 4096  # entries: a thread on one CPU
_FOLDER = f"{INSTANCE}/events/sched/sched_switch"
# The name comes first, and is the thread's own choice: it may have any characters except NUL, such as a line feed.
_ENTRY = re.compile(r"^(.*), common_cpu: +(\d+), next_pid: +(\d+) *\} hitcount: +(\d+)$", re.ASCII)
_TRIGGER = re.compile(rf"^hist:keys={_KEYS}:.*:size=(\d+)(?: if (.*?))? \[", re.ASCII | re.MULTILINE)

SwitchesByCpu = Mapping[int, Sequence[Switches]]


def plan_switches(housekeeping: CpuSet) -> Histogram:
    """Of all CPUs except those for housekeeping, which switch often. Thread 0 is the idle loop."""
    condition = " && ".join(("next_pid != 0", *(f"CPU != {cpu}" for cpu in housekeeping)))
    return Histogram("sched_switch", _KEYS, _SIZE, condition, "sched")


def is_counting(host: HostRoot, housekeeping: CpuSet) -> bool:
    """Raises HostError if that cannot be read."""
    wanted = plan_switches(housekeeping).condition
    return any(condition == wanted for _, condition in _TRIGGER.findall(host.find(f"{_FOLDER}/trigger") or ""))


def begin_switches(host: HostRoot, housekeeping: CpuSet) -> None:
    """Replaces a trigger for other housekeeping CPUs; the instance must exist. Raises HostError."""
    if not is_counting(host, housekeeping):
        end_switches(host)
        if not host.exists(f"{_FOLDER}/trigger"):
            raise HostError(f"/{_FOLDER} does not exist", "check that the kernel has the tracepoint sched:sched_switch")
        begin_counter(host, plan_switches(housekeeping))


def end_switches(host: HostRoot) -> None:
    """Removes the trigger, and with it all counts. No-op without it."""
    for size, condition in _TRIGGER.findall(host.find(f"{_FOLDER}/trigger") or ""):
        host.write(f"{_FOLDER}/trigger", f"!{Histogram('sched_switch', _KEYS, int(size), condition, 'sched').trigger}")


def make_room(host: HostRoot, housekeeping: CpuSet) -> None:
    """Begins to count anew once the histogram is full or almost: the kernel removes no entries. No-op without it."""
    if not is_counting(host, housekeeping):
        return
    text, dropped = read_histogram(host, plan_switches(housekeeping))
    if dropped or text.count(" } hitcount:") > _SIZE * 3 // 4:
        end_switches(host)
        begin_switches(host, housekeeping)


def read_switches(host: HostRoot) -> SwitchesByCpu:
    """To each thread since ``begin_switches``. Raises HostError if they are not counted."""
    return read_all_switches(host)[0]


def read_all_switches(host: HostRoot) -> tuple[SwitchesByCpu, int]:
    """Also the number of switches that were not counted, because the histogram is full."""
    text, dropped = read_histogram(host, plan_switches(CpuSet()))
    found: defaultdict[int, list[Switches]] = defaultdict(list)
    for line in text.split("\n"):
        if entry := _ENTRY.match(line):
            found[int(entry[2])].append(Switches(int(entry[3]), _show_name(entry[1]), int(entry[4])))
    return found, dropped


def sum_switches(switches: SwitchesByCpu, cpus: CpuSet) -> tuple[Switches, ...]:
    """Of each thread, on all these CPUs."""
    counts: dict[tuple[int, str], int] = {}
    for one in (one for cpu in cpus for one in switches.get(cpu, ())):
        counts[one.tid, one.name] = counts.get((one.tid, one.name), 0) + one.count
    return tuple(Switches(tid, name, count) for (tid, name), count in sorted(counts.items()))


def _show_name(text: str) -> str:
    name = text.removeprefix("{ next_comm: ").rstrip(" ")
    return "".join(char if char.isprintable() else "?" for char in name) or "?"
