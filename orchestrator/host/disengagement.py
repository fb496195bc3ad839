"""Guests' own signal that their boot is over: a hypercall with a number that KVM does not know.

KVM refuses it (to programs with EPERM, to the guest's kernel with ENOSYS) and the tracepoint kvm:kvm_hypercall is hit before that
(arch/x86/kvm/x86.c, kvm_emulate_hypercall). A histogram on it counts the calls per thread, in the trace instance of `exit_trace`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from orchestrator.errors import HostError
from orchestrator.host.exit_trace import INSTANCE
from orchestrator.host.root import HostRoot

CALL_NUMBER, BOOT_IS_OVER = 0x4E48, 1
"""The number of the call (rax), and its first argument (rbx)."""
_CALLS = f"{INSTANCE}/events/kvm/kvm_hypercall"
_SIZE = 2048  # entries: threads that have made the call
_FILTER = f"nr == {CALL_NUMBER} && a0 == {BOOT_IS_OVER}"
_TRIGGER = f"hist:keys=common_pid:size={_SIZE} if {_FILTER}"
_ENTRY = re.compile(r"\{ common_pid: *(\d+) *\} hitcount: *(\d+)", re.ASCII)
_TOTALS = re.compile(r"Dropped: \d+", re.ASCII)


def is_listening(host: HostRoot) -> bool:
    """The trigger is set. Raises HostError if that cannot be read."""
    text = host.find(f"{_CALLS}/trigger") or ""
    return _TRIGGER.partition(":size")[0] in text and _FILTER in text


def begin_listening(host: HostRoot) -> None:
    """Sets the trigger, unless it is set, and reads it back; the trace instance must exist. Raises HostError."""
    if not is_listening(host):
        host.write(f"{_CALLS}/trigger", _TRIGGER)
        if not is_listening(host):
            raise HostError(f"the trigger {_TRIGGER} was written to /{_CALLS}/trigger, but it is not there")


def end_listening(host: HostRoot) -> None:
    """Removes the trigger. No-op without it."""
    if is_listening(host):
        host.write(f"{_CALLS}/trigger", f"!{_TRIGGER}")


def read_calls(host: HostRoot) -> dict[int, int]:
    """Thread id → calls since ``begin_listening``. Raises HostError if nothing listens."""
    text = host.read(f"{_CALLS}/hist")
    if not _TOTALS.search(text):
        raise HostError(f"cannot parse /{_CALLS}/hist: no totals")
    return {int(tid): int(count) for tid, count in _ENTRY.findall(text)}


def forget_calls(host: HostRoot, tids: Iterable[int]) -> None:
    """Before threads with these ids run a vCPU: the kernel gives thread ids again, and the calls of an earlier thread are not
    theirs. Also if the histogram is half full. The kernel can only drop all entries: a call between the two writes is lost.
    """
    if not is_listening(host):
        return
    calls = read_calls(host)
    if calls.keys() & set(tids) or 2 * len(calls) >= _SIZE:
        end_listening(host)
        begin_listening(host)
