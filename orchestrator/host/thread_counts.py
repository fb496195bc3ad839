"""Events of KVM that the kernel counts per thread, in the trace instance of `exit_trace`.

``CALLS`` are guests' own signals that their boot is over: a hypercall with a number that KVM does not know. KVM refuses it (EPERM
for programs, ENOSYS for the guest's kernel), and the tracepoint is hit before that (arch/x86/kvm/x86.c, kvm_emulate_hypercall).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.errors import HostError
from orchestrator.host.exit_trace import INSTANCE
from orchestrator.host.root import HostRoot

CALL_NUMBER, BOOT_IS_OVER = 0x4E48, 1
"""The number of the call (rax), and its first argument (rbx)."""
_SIZE = 2048  # entries: threads with this event
_ENTRY = re.compile(r"\{ common_pid: *(\d+) *\} hitcount: *(\d+)", re.ASCII)
_DROPPED = re.compile(r"Dropped: (\d+)", re.ASCII)


@dataclass(frozen=True)
class ThreadCounter:
    """A histogram trigger on a tracepoint; ``condition`` is its filter."""

    event: str
    condition: str

    @property
    def folder(self) -> str:
        return f"{INSTANCE}/events/kvm/{self.event}"

    @property
    def trigger(self) -> str:
        return f"hist:keys=common_pid:size={_SIZE} if {self.condition}"


CALLS = ThreadCounter("kvm_hypercall", f"nr == {CALL_NUMBER} && a0 == {BOOT_IS_OVER}")
# KVM_TRACE_MMIO_READ_UNSATISFIED (0) is followed by KVM_TRACE_MMIO_READ once the device has answered (arch/x86/kvm/x86.c).
MMIO = ThreadCounter("kvm_mmio", "type != 0")
COUNTERS = (CALLS, MMIO)


def is_counted(host: HostRoot, counter: ThreadCounter) -> bool:
    """The trigger is set. Raises HostError if that cannot be read."""
    text = host.find(f"{counter.folder}/trigger") or ""
    return counter.trigger.partition(":size")[0] in text and counter.condition in text


def begin_counter(host: HostRoot, counter: ThreadCounter) -> None:
    """Sets the trigger, unless it is set, and reads it back; the trace instance must exist. Raises HostError."""
    if not is_counted(host, counter):
        host.write(f"{counter.folder}/trigger", counter.trigger)
        if not is_counted(host, counter):
            raise HostError(f"the trigger {counter.trigger} was written to /{counter.folder}/trigger, but it is not there")


def end_counter(host: HostRoot, counter: ThreadCounter) -> None:
    """Removes the trigger. No-op without it."""
    if is_counted(host, counter):
        host.write(f"{counter.folder}/trigger", f"!{counter.trigger}")


def read_counter(host: HostRoot, counter: ThreadCounter) -> dict[int, int]:
    """Thread id → events since ``begin_counter``. Raises HostError if they are not counted, or not all."""
    text = host.read(f"{counter.folder}/hist")
    dropped = _DROPPED.search(text)
    if not dropped:
        raise HostError(f"cannot parse /{counter.folder}/hist: no totals")
    if int(dropped[1]):
        raise HostError(f"the histogram /{counter.folder}/hist is full: {dropped[1]} events were not counted")
    return {int(tid): int(count) for tid, count in _ENTRY.findall(text)}


def forget_threads(host: HostRoot, tids: Iterable[int]) -> None:
    """Before threads with these ids run a vCPU: the kernel gives thread ids again, and the events of an earlier thread are not
    theirs. Also if a histogram is half full. The kernel can only drop all entries: an event between the two writes is lost.
    """
    wanted = set(tids)
    for counter in COUNTERS:
        if is_counted(host, counter):
            try:
                counts = read_counter(host, counter)
            except HostError:
                counts = dict.fromkeys(wanted, 1)  # it is full
            if counts.keys() & wanted or 2 * len(counts) >= _SIZE:
                end_counter(host, counter)
                begin_counter(host, counter)
