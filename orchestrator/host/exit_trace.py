"""VM exits by hardware reason: the kernel counts them in a histogram on the tracepoint kvm:kvm_exit (see `host.histogram`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from errno import EBUSY, EEXIST, EINVAL, ENOENT, EPERM
from functools import lru_cache

from orchestrator.errors import HostError
from orchestrator.host.histogram import INSTANCE, TRACING, Histogram, begin_counter, end_counter, is_counted, read_histogram
from orchestrator.host.root import HostRoot
from orchestrator.model.exit_reasons import ExitTrace

HISTOGRAM_SIZE = 16384  # entries: a thread id identifies a vCPU, and a vCPU exits for some 20 reasons
EXITS = Histogram("kvm_exit", "common_pid,exit_reason", HISTOGRAM_SIZE)
_FORMAT = f"{TRACING}/events/kvm/kvm_exit/format"
_ENTRY = re.compile(r"\{ common_pid: *(\d+), exit_reason: *(\d+) *\} hitcount: *(\d+)", re.ASCII)
_SYMBOLS = re.compile(r"__print_symbolic\(REC->exit_reason([^,]*), (.*?)\)(?= :|, )", re.ASCII)
_SYMBOL = re.compile(r'\{ ([-+ 0-9a-fx]+), "([^"]+)" \}', re.ASCII)
_VMX_FAILED_ENTRY = 1 << 31  # bit 31 of the exit reason (Intel SDM volume 3, section 24.9.1)


def is_counting(host: HostRoot) -> bool:
    """The trigger is set. Raises HostError if that cannot be read."""
    return is_counted(host, EXITS)


def begin_counting(host: HostRoot) -> None:
    """Makes the instance and sets the trigger; reads it back. Raises HostError with the reason that the kernel gives."""
    if not host.exists(f"{TRACING}/instances"):
        raise HostError(f"/{TRACING} is not mounted", "mount it: mount -t tracefs nodev /sys/kernel/tracing", ENOENT)
    try:
        host.make_folder(INSTANCE)
    except HostError as error:
        if error.errno == EPERM:
            raise HostError("the kernel is locked down: /sys/kernel/security/lockdown", _KVM_ONLY, EPERM) from None
        if error.errno != EEXIST:
            raise
    if not host.exists(EXITS.folder):
        remove_instance(host)
        raise HostError("the kernel has no tracepoint kvm:kvm_exit", "load the module kvm_amd or kvm_intel", ENOENT)
    try:
        begin_counter(host, EXITS)
    except HostError as error:
        remove_instance(host)
        if error.errno in (EINVAL, ENOENT):
            raise HostError("the kernel was built without CONFIG_HIST_TRIGGERS", _KVM_ONLY, error.errno) from None
        raise


def end_counting(host: HostRoot) -> None:
    """Removes the trigger and the instance. No-op without the instance."""
    if host.exists(INSTANCE):
        end_counter(host, EXITS)
        remove_instance(host)


def remove_instance(host: HostRoot) -> None:
    """With all triggers in it. Raises HostError if a program has one of its files open."""
    try:
        host.remove_folder(INSTANCE)
    except HostError as error:
        if error.errno == EBUSY:
            hint = f"end the program that has a file below /{INSTANCE} open (fuser -v /{INSTANCE}/trace_pipe)"
            raise HostError(f"cannot remove /{INSTANCE}: it is in use", hint, EBUSY) from None
        if error.errno != ENOENT:
            raise


def make_room(host: HostRoot) -> None:
    """Begins to count anew once half of the histogram is used, most of it by threads that have ended: the kernel removes no
    entries, and counts no new ones in a full histogram. Running vCPUs lose their reasons until then.
    """
    sizes = {tid: len(reasons) for tid, reasons in read_counts(host).threads.items()}
    ended = sum(size for tid, size in sizes.items() if not host.exists(f"proc/{tid}"))
    used = sum(sizes.values())
    if 2 * used >= HISTOGRAM_SIZE and 2 * ended >= used:
        end_counter(host, EXITS)
        begin_counting(host)


def read_counts(host: HostRoot) -> ExitTrace:
    """Counts of all threads that ran a vCPU since ``begin_counting``. Raises HostError if nothing is counted."""
    (text, dropped), names = read_histogram(host, EXITS), read_reasons(host)
    threads: dict[int, dict[str, int]] = {}
    for tid, reason, count in _ENTRY.findall(text):
        counts = threads.setdefault(int(tid), {})
        name = name_reason(int(reason), names)
        counts[name] = counts.get(name, 0) + int(count)
    return ExitTrace(threads, dropped)


def read_reasons(host: HostRoot) -> Mapping[int, str]:
    """KVM's names of the exit reasons of this CPU vendor, from the format of the tracepoint."""
    vmx, svm = parse_reasons(host.read(_FORMAT))
    return svm if host.exists("sys/module/kvm_amd") else vmx


def name_reason(reason: int, names: Mapping[int, str]) -> str:
    if reason in names:
        return names[reason]
    plain = reason & ~_VMX_FAILED_ENTRY
    return f"{names[plain]} (failed entry)" if plain in names and plain < 1 << 16 else f"reason {reason:#x}"


@lru_cache(maxsize=1)  # the same text as long as the kernel runs; read several times per minute
def parse_reasons(text: str) -> tuple[Mapping[int, str], Mapping[int, str]]:
    """The names for VMX and for SVM. Raises HostError if the format has not these two tables (arch/x86/kvm/trace.h)."""
    tables = {expression.strip(): body for expression, body in _SYMBOLS.findall(text)}
    if set(tables) != {"& 0xffff", ""}:
        raise HostError(f"cannot parse /{_FORMAT}: {len(tables)} tables of exit reasons")
    vmx, svm = (
        {sum(int(term, 0) for term in number.split("+")) & 0xFFFF_FFFF: name for number, name in _SYMBOL.findall(tables[key])}
        for key in ("& 0xffff", "")
    )
    return vmx, svm


_KVM_ONLY = "exits are still counted by KVM's classes; only their hardware reasons are unknown"
