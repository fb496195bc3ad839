"""core-quiet, second part: what happened on a guest's cores since the guest was started. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.audit.core_quiet import INTERRUPTS, SOFTIRQS
from orchestrator.host.processes import Thread
from orchestrator.model.core_start import CoreStart, Switches
from orchestrator.model.proof import WEAKER, Measurement, Values, Verdict
from orchestrator.values import CpuSet

# Names of kernel threads that belong to one CPU: kthread_create_on_cpu(), smpboot.c, create_worker() in workqueue.c.
_PER_CPU = re.compile(r"(?:migration|ksoftirqd|cpuhp|rcuc|irq_work|idle_inject)/(\d+)|kworker/(\d+):\d+H?", re.ASCII)
_COMM = 15  # characters that the scheduler keeps of a name (TASK_COMM_LEN)
_SHOWN = 12  # findings in one sentence


@dataclass(frozen=True)
class History:
    """``start``: as the manager recorded it. ``names``: of interrupts, by the word that counts have."""

    start: CoreStart
    now: CoreStart
    names: Mapping[str, str]


@dataclass(frozen=True)
class _Counted:
    """Each count with its name."""

    expected: list[str]
    unexpected: list[str]
    number: int  # of unexpected ones


def add_history(
    result: Measurement, history: History | str, vcpus: frozenset[int], cores: CpuSet, threads: Iterable[Thread]
) -> Measurement:
    """The verdict and the figure stay those of the measured time: what happened once since the start never goes away.

    ``history``: or why it is not known. ``vcpus``: thread ids. ``threads``: of the host, now.
    """
    if result.verdict is Verdict.NOT_MEASURED:
        return result
    if not isinstance(history, str) and history.start.run != history.now.run:
        history = "the record is of an earlier run of the guest"
    if isinstance(history, str):
        return _extend(result, [f"{WEAKER}what happened on the cores since the start of the guest is not known: {history}"], {})
    start, now = history.start, history.now
    counted = _count(history, vcpus, cores, {thread.tid: thread for thread in threads})
    seconds = now.time - start.time
    since = f"since the start of the guest, {seconds:.0f} s ago" if start.at_launch else f"during the last {seconds:.0f} s"
    limits = [f"{since}, {counted.number} unexpected: {_join(counted.unexpected)}"] if counted.number else []
    if not start.at_launch:
        late = start.time - start.started
        limits.append(f"the count began {late:.0f} s after the start of the guest, when a manager adopted it")
    if start.switches is None or now.switches is None:
        limits.append(f"threads that ran on the cores since the start are not counted: {start.why or now.why}")
    lines = [*(f"{WEAKER}{limit}" for limit in limits), f"{since}: {', '.join(counted.expected) or 'nothing'}"]
    return _extend(result, lines, {"since_start_seconds": round(seconds, 1), "since_start_unexpected": counted.number})


def _extend(result: Measurement, lines: list[str], values: Values) -> Measurement:
    return Measurement(result.verdict, result.figure, (*result.evidence, *lines), result.readings, {**result.values, **values})


def _count(history: History, vcpus: frozenset[int], cores: CpuSet, threads: Mapping[int, Thread]) -> _Counted:
    start, now = history.start, history.now
    found = _Counted([], [], 0)
    number = 0
    for kind, allowed, before, after in (
        ("interrupts", INTERRUPTS, start.interrupts, now.interrupts),
        ("softirqs", SOFTIRQS, start.softirqs, now.softirqs),
    ):
        for name, count in after.items():
            # A counter that has fallen was removed with its interrupt, and began anew.
            grown = count - before.get(name, 0) if count >= before.get(name, 0) else count
            if not grown:
                continue
            meaning = history.names.get(name, "") if kind == "interrupts" and name not in allowed else ""
            text = f"{grown} {kind} {name}" + (f" ({meaning})" if meaning else "")
            (found.expected if name in allowed else found.unexpected).append(text)
            number += 0 if name in allowed else grown
    switches = _count_switches(start, now, vcpus, cores, threads)
    return _Counted([*found.expected, *switches.expected], [*found.unexpected, *switches.unexpected], number + switches.number)


def _count_switches(
    start: CoreStart, now: CoreStart, vcpus: frozenset[int], cores: CpuSet, threads: Mapping[int, Thread]
) -> _Counted:
    """Time slices: each is a switch to a thread."""
    expected, unexpected, number, of_vcpus, named = list[str](), list[str](), 0, 0, 0
    before = {(one.tid, one.name): one.count for one in start.switches or ()}
    for one in now.switches or ():
        known = before.get((one.tid, one.name), 0)
        grown = one.count - known if one.count >= known else one.count
        named += grown
        if one.tid in vcpus:
            of_vcpus += grown
        elif grown and (why := _find_reason(one, cores, threads.get(one.tid))):
            expected.append(f"{grown} time slices of {one.name} ({one.tid}), {why}")
        elif grown:
            unexpected.append(f"{grown} time slices of {one.name} ({one.tid})")
            number += grown
    if now.switches is not None and start.switches is not None:
        expected.append(f"{of_vcpus} time slices of the guest's vCPUs")
        # Read so that switches are counted for at least as long as slices. More slices: the histogram was full, or began anew.
        if None not in (now.slices, start.slices) and (rest := (now.slices or 0) - (start.slices or 0) - named) > 0:
            unexpected.append(f"{rest} time slices of threads whose names the kernel did not count")
            number += rest
    return _Counted(expected, unexpected, number)


def _find_reason(one: Switches, cores: CpuSet, thread: Thread | None) -> str | None:
    """Why a thread cannot be kept away; None if it can. Of a thread that has ended, only the name is known."""
    if thread and thread.kernel and thread.pinned_by_kernel and _is_name_of(thread, one.name):
        return "which the kernel pins" if len(thread.allowed) == 1 else None
    if thread and thread.name == one.name:
        return None
    match = _PER_CPU.fullmatch(one.name)
    if match and int(match[1] or match[2]) in cores:
        return "which has ended, by its name a thread that the kernel pins"
    return None


def _is_name_of(thread: Thread, name: str) -> bool:
    """/proc/PID/comm of a kernel thread has its whole name, and of a worker also its workqueue (fs/proc/array.c, proc_task_name;
    kernel/workqueue.c, wq_worker_comm). A program that had the same id before may have had the beginning of it.
    """
    rest = thread.name.removeprefix(name)
    return thread.name.startswith(name) and (not rest or rest[0] in "+-" or len(name) == _COMM)


def _join(texts: list[str]) -> str:
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
