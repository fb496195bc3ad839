"""Histograms of tracepoints, which the kernel counts in a trace instance of the manager's own.

Other users of tracing are not disturbed, and no program runs on guest cores for it (Documentation/trace/histogram.rst;
Documentation/trace/ftrace.rst, section "Instances").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot

TRACING = "sys/kernel/tracing"
INSTANCE = f"{TRACING}/instances/nohype"
# kernel/trace/trace_events_hist.c, event_hist_trigger_print(): the filter is shown as it was written.
_TRIGGER = re.compile(r"^hist:keys=([^:]*):.*?(?: if (.*?))? \[\w+\]", re.ASCII | re.MULTILINE)
_DROPPED = re.compile(r"Dropped: (\d+)", re.ASCII)


@dataclass(frozen=True)
class Histogram:
    """A histogram trigger on a tracepoint."""

    event: str
    keys: str  # at most three fields (TRACING_MAP_KEYS_MAX), separated by commas
    size: int  # entries
    condition: str = ""  # its filter
    system: str = "kvm"  # folder of the event

    @property
    def folder(self) -> str:
        return f"{INSTANCE}/events/{self.system}/{self.event}"

    @property
    def trigger(self) -> str:
        return f"hist:keys={self.keys}:size={self.size}" + (f" if {self.condition}" if self.condition else "")


def is_counted(host: HostRoot, histogram: Histogram) -> bool:
    """The trigger is set, with exactly this condition. Raises HostError if that cannot be read."""
    found = _TRIGGER.findall(host.find(f"{histogram.folder}/trigger") or "")
    return (histogram.keys, histogram.condition) in found


def begin_counter(host: HostRoot, histogram: Histogram) -> None:
    """Sets the trigger, unless it is set, and reads it back; the trace instance must exist. Raises HostError."""
    if not is_counted(host, histogram):
        host.write(f"{histogram.folder}/trigger", histogram.trigger)
        if not is_counted(host, histogram):
            raise HostError(f"the trigger {histogram.trigger} was written to /{histogram.folder}/trigger, but it is not there")


def end_counter(host: HostRoot, histogram: Histogram) -> None:
    """Removes the trigger, and with it all counts. No-op without it."""
    if is_counted(host, histogram):
        host.write(f"{histogram.folder}/trigger", f"!{histogram.trigger}")


def read_histogram(host: HostRoot, histogram: Histogram) -> tuple[str, int]:
    """Its text, and the number of events that were not counted since it was full. Raises HostError if nothing is counted."""
    text = host.read(f"{histogram.folder}/hist")
    dropped = _DROPPED.search(text)
    if not dropped:
        raise HostError(f"cannot parse /{histogram.folder}/hist: no totals")
    return text, int(dropped[1])
