"""Events of KVM that the kernel counts per thread, in histograms of `host.histogram`.

``CALLS`` are guests' own signals that their boot is over: a hypercall with a number that KVM does not know. KVM refuses it (EPERM
for programs, ENOSYS for the guest's kernel), and the tracepoint is hit before that (arch/x86/kvm/x86.c, kvm_emulate_hypercall).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from orchestrator.errors import HostError
from orchestrator.host.histogram import Histogram, begin_counter, end_counter, is_counted, read_histogram
from orchestrator.host.root import HostRoot

CALL_NUMBER, BOOT_IS_OVER = 0x4E48, 1
"""The number of the call (rax), and its first argument (rbx)."""
_SIZE = 2048  # entries: threads with this event
_ENTRY = re.compile(r"\{ common_pid: *(\d+) *\} hitcount: *(\d+)", re.ASCII)


CALLS = Histogram("kvm_hypercall", "common_pid", _SIZE, f"nr == {CALL_NUMBER} && a0 == {BOOT_IS_OVER}")
# KVM_TRACE_MMIO_READ_UNSATISFIED (0) is followed by KVM_TRACE_MMIO_READ once the device has answered (arch/x86/kvm/x86.c).
MMIO = Histogram("kvm_mmio", "common_pid", _SIZE, "type != 0")
COUNTERS = (CALLS, MMIO)


def read_counter(host: HostRoot, counter: Histogram) -> dict[int, int]:
    """Thread id → events since ``begin_counter``. Raises HostError if they are not counted, or not all."""
    text, dropped = read_histogram(host, counter)
    if dropped:
        raise HostError(f"the histogram /{counter.folder}/hist is full: {dropped} events were not counted")
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
