"""Threads, memory maps and open files of the processes of a host, as /proc shows them. Reads only.

Sources: proc_pid_stat(5), proc_pid_status(5), Documentation/filesystems/proc.rst, Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENOENT, ESRCH

from orchestrator.errors import HostError, RequestError
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

# include/linux/sched.h; both flags kept their values since they came (2.6.24 and 3.10).
_PF_KTHREAD = 0x0020_0000
_PF_NO_SETAFFINITY = 0x0400_0000
# fs/proc/array.c, do_task_stat(): USER_HZ, which is 100 on x86 whatever CONFIG_HZ is.
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGESIZE")
_HUGETLB = re.compile(r"^HugetlbPages:\s*(\d+) kB", re.MULTILINE | re.ASCII)
_SMAPS_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ *(.*)$", re.ASCII)
_LINE = re.compile(r".+")
_EXEC_START = re.compile(r"^se\.exec_start\s*:\s*([0-9.]+)", re.MULTILINE)
_PAGEMAP_PRESENT = 1 << 63
_PAGEMAP_FRAME = (1 << 55) - 1


@dataclass(frozen=True)
class Thread:
    """A thread, kernel threads included.

    Attributes:
        name: the kernel's name for it (``comm``, cut to 15 characters for user threads).
        allowed: CPUs it may run on.
        last_cpu: CPU it last ran on, or was put on to run.
        kernel: whether it is a kernel thread (PF_KTHREAD).
        pinned_by_kernel: whether the kernel forbids to move it (PF_NO_SETAFFINITY).
        started: seconds from boot to its creation.
    """

    pid: int
    tid: int
    name: str
    allowed: CpuSet
    last_cpu: int
    kernel: bool
    pinned_by_kernel: bool
    started: float

    def __str__(self) -> str:
        return f"{self.name} ({self.tid} of process {self.pid})" if self.tid != self.pid else f"{self.name} ({self.pid})"


@dataclass(frozen=True)
class Mapping:
    """One memory mapping of a process: /proc/PID/smaps joined with /proc/PID/numa_maps by start address.

    Attributes:
        path: the file or the kernel's name in brackets; empty for anonymous memory.
        offset: byte offset in the file.
        page_size: bytes of the pages it is made of.
        resident: bytes of normal memory in RAM (``Rss``; the kernel does not count huge pages of a pool there).
        huge: bytes of huge pages of a pool (``Shared_Hugetlb`` and ``Private_Hugetlb``).
        flags: the two-letter ``VmFlags``: ``lo`` locked, ``ht`` pool page, ``mg`` mergeable, ``io``, ``pf``, ...
        policy: NUMA policy, ``bind:0``.
        nodes: (node, pages) for each node that pages lie on; pages of ``page_size``.
    """

    start: int
    end: int
    path: str
    offset: int
    page_size: int
    resident: int
    huge: int
    flags: frozenset[str]
    policy: str
    nodes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Maps:
    """The memory of a process. ``locked`` is VmLck of /proc/PID/status in bytes."""

    mappings: tuple[Mapping, ...]
    locked: int


def read_boot_id(host: HostRoot) -> str:
    """What this run of the kernel is called: another one after each boot (random(4))."""
    return host.read("proc/sys/kernel/random/boot_id")


def read_arguments(host: HostRoot, pid: int) -> tuple[str, ...]:
    """Raises HostError (ENOENT or ESRCH) if the process has ended."""
    return tuple(host.read_bytes(f"proc/{pid}/cmdline").decode(errors="replace").rstrip("\0").split("\0"))


def find_comm(host: HostRoot, tid: int) -> str | None:
    """The kernel's name of a thread, None if it has ended."""
    return host.find(f"proc/{tid}/comm")


def read_resident(host: HostRoot, pid: int) -> int:
    """Bytes of a process in RAM, without huge pages of a pool (proc_pid_statm(5))."""
    name = f"proc/{pid}/statm"
    text = host.read(name)
    try:
        return int(text.split()[1]) * _PAGE
    except (IndexError, ValueError):
        raise HostError(f"cannot parse /{name}: {text!r}") from None


def survey_threads(host: HostRoot) -> tuple[tuple[Thread, ...], tuple[HostError, ...]]:
    """All threads of all processes, and the errors of threads that could not be read. Threads that end meanwhile are left out."""
    threads: list[Thread] = []
    problems: list[HostError] = []
    # Most threads share a few sets of CPUs, which are long on a large host.
    known: dict[str, CpuSet] = {}
    for pid in sorted(int(name) for name in host.names("proc") if name.isdigit()):
        try:
            tids = _read_tids(host, pid)
        except HostError as error:
            problems.append(error)
            continue
        for tid in tids:
            try:
                thread = _read_thread(host, pid, tid, known)
            except HostError as error:
                problems.append(error)
            else:
                threads += [thread] if thread else []
    return tuple(threads), tuple(problems)


def read_process_threads(host: HostRoot, pid: int) -> tuple[Thread, ...]:
    """The threads of one process, none if it has ended. See ``read_threads``."""
    known: dict[str, CpuSet] = {}
    found = (_read_thread(host, pid, tid, known) for tid in _read_tids(host, pid))
    return tuple(thread for thread in found if thread)


def read_last_run(host: HostRoot, thread: Thread) -> float | None:
    """The latest second after boot at which the thread can have run last; None if the kernel does not say.

    ``se.exec_start`` of /proc/PID/task/TID/sched (CONFIG_SCHED_DEBUG) is the run queue's task clock in milliseconds. It stands
    still while the CPU serves interrupts or is stolen (kernel/sched/core.c, update_rq_clock_task), so that time is added to stay
    on the safe side. It is 0 after a wake-up on another CPU, and for a thread that is not in the fair class.
    """
    try:
        match = _EXEC_START.search(host.read(f"proc/{thread.pid}/task/{thread.tid}/sched"))
    except HostError as error:
        if error.errno in (ENOENT, ESRCH):
            return None
        raise
    if not match or not float(match[1]):
        return None
    return float(match[1]) / 1000 + _read_interrupt_time(host, thread.last_cpu)


def read_huge_pages(host: HostRoot) -> dict[int, int]:
    """Bytes of huge pages, of any pool, that each process has which has some (``HugetlbPages`` in proc_pid_status(5))."""
    found = {}
    for pid in (int(name) for name in host.names("proc") if name.isdecimal()):
        try:
            match = _HUGETLB.search(host.read(f"proc/{pid}/status"))
        except HostError as error:
            if error.errno in (ENOENT, ESRCH):
                continue
            raise
        if match and int(match[1]):
            found[pid] = int(match[1]) << 10
    return found


def read_maps(host: HostRoot, pid: int) -> Maps:
    """The memory mappings of a process.

    Raises:
        HostError: the process has gone, or its maps are forbidden to us.
    """
    numa = parse_numa_maps(host.read(f"proc/{pid}/numa_maps"))
    locked = re.search(r"^VmLck:\s*(\d+) kB", host.read(f"proc/{pid}/status"), re.MULTILINE)
    if not locked:
        raise HostError(f"cannot parse /proc/{pid}/status: no VmLck", "zombies and kernel threads have no memory")
    return Maps(tuple(parse_smaps(host.read(f"proc/{pid}/smaps"), numa)), int(locked[1]) << 10)


def parse_numa_maps(text: str) -> dict[int, tuple[str, tuple[tuple[int, int], ...]]]:
    """Start address → NUMA policy and pages a node, from /proc/PID/numa_maps."""
    result = {}
    for line in text.splitlines():
        start, policy, *words = line.split()
        pages = [word[1:].split("=") for word in words if re.fullmatch(r"N\d+=\d+", word, re.ASCII)]
        result[int(start, 16)] = (policy, tuple((int(node), int(count)) for node, count in pages))
    return result


def parse_smaps(text: str, numa: dict[int, tuple[str, tuple[tuple[int, int], ...]]]) -> Iterator[Mapping]:
    """The mappings of /proc/PID/smaps. One that numa_maps lacks (it is read a moment earlier) gets no policy and no nodes."""
    head: re.Match[str] | None = None
    fields: dict[str, str] = {}
    # A guest's QEMU has hundreds of mappings of some twenty lines, and the manager mostly keeps what memory it has once taken: no
    # list is made of the lines, and of each set of flags, of which there are few, there is one.
    flags: dict[str, frozenset[str]] = {}
    for whole in _LINE.finditer(text):
        line = whole[0]
        found = _SMAPS_HEAD.match(line)
        if found:
            head, fields = found, {}
            continue
        key, _, value = line.partition(":")
        fields[key] = value.strip()
        if key == "VmFlags" and head:  # always the last line of a mapping (fs/proc/task_mmu.c, show_smap)
            shared = flags.setdefault(fields[key], frozenset(fields[key].split()))
            yield _mapping(head, fields, shared, numa)


def read_pagemap(host: HostRoot, pid: int, addresses: tuple[int, ...]) -> tuple[int | None, ...]:
    """Host physical address of each virtual address, None where no page is present.

    Args:
        addresses: virtual addresses in bytes.

    Raises:
        HostError: the file cannot be read, or hides the frames: without CAP_SYS_ADMIN the kernel shows them as 0.
    """
    result: list[int | None] = []
    for address in addresses:
        (entry,) = struct.unpack("<Q", host.read_at(f"proc/{pid}/pagemap", address // _PAGE * 8, 8))
        frame = entry & _PAGEMAP_FRAME
        if entry & _PAGEMAP_PRESENT and not frame:
            what = f"cannot read page frames from /proc/{pid}/pagemap: CAP_SYS_ADMIN is required"
            raise HostError(what, "run as root, outside a container")
        result.append(frame * _PAGE + address % _PAGE if entry & _PAGEMAP_PRESENT else None)
    return tuple(result)


def read_open_files(host: HostRoot, pid: int) -> tuple[str, ...]:
    """What the open descriptors of a process point to: paths, ``anon_inode:kvm-vm``, ``socket:[123]``.

    Raises:
        HostError: the process has gone, or its descriptors are forbidden to us.
    """
    targets = (host.target(f"proc/{pid}/fd/{name}") for name in host.names(f"proc/{pid}/fd"))
    return tuple(target for target in targets if target is not None)


def read_services(host: HostRoot, units: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The processes of systemd services, by the cgroup that they are in (cgroup v2); none for one that does not run.

    Args:
        units: names of units, ``libvirtd.service``.
    """
    found: dict[str, list[int]] = {unit: [] for unit in units}
    for pid in sorted(int(name) for name in host.names("proc") if name.isdigit()):
        try:
            cgroups = host.read(f"proc/{pid}/cgroup")
        except HostError as error:
            if error.errno in (ENOENT, ESRCH):
                continue
            raise
        parts = {part for line in cgroups.splitlines() for part in line.split(":", 2)[-1].split("/")}
        for unit in parts & found.keys():
            found[unit].append(pid)
    return {unit: tuple(pids) for unit, pids in found.items()}


def _read_tids(host: HostRoot, pid: int) -> tuple[int, ...]:
    try:
        return tuple(sorted(map(int, host.names(f"proc/{pid}/task"))))
    except HostError as error:
        if error.errno in (ENOENT, ESRCH):
            return ()
        raise


def _read_thread(host: HostRoot, pid: int, tid: int, known: dict[str, CpuSet]) -> Thread | None:
    folder = f"proc/{pid}/task/{tid}"
    try:
        stat, status = host.read(f"{folder}/stat"), host.read(f"{folder}/status")
    except HostError as error:
        # ESRCH: it ended between open(2) and read(2).
        if error.errno in (ENOENT, ESRCH):
            return None
        raise
    return _parse_thread(pid, tid, stat, status, known)


def _parse_thread(pid: int, tid: int, stat: str, status: str, known: dict[str, CpuSet]) -> Thread | None:
    """None for a thread that has already exited (zombie). Adds to `known`: CPU sets by their text."""
    try:
        # The name may hold spaces and brackets: proc_pid_stat(5) says to look for the last closing one.
        name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        if fields[0] in "ZX":
            return None
        # Not by a regular expression: it would try each position of a long text, and there are thousands of threads.
        _, found, rest = status.partition("Cpus_allowed_list:")
        if not found:
            what = f"cannot parse /proc/{pid}/task/{tid}/status: no Cpus_allowed_list"
            raise HostError(what, "use a kernel with SMP support")
        flags, text = int(fields[6]), rest.partition("\n")[0]
        allowed = known[text] = known.get(text) or CpuSet.parse(text)
        return Thread(
            pid, tid, name, allowed, int(fields[36]),
            kernel=bool(flags & _PF_KTHREAD), pinned_by_kernel=bool(flags & _PF_NO_SETAFFINITY),
            started=int(fields[19]) / _TICKS,
        )  # fmt: skip
    except (IndexError, ValueError, RequestError) as error:
        raise HostError(f"cannot parse /proc/{pid}/task/{tid}/stat or status: {error}") from None


def _read_interrupt_time(host: HostRoot, cpu: int) -> float:
    """Seconds a CPU has spent in interrupts or had stolen since boot (proc_stat(5): irq, softirq, steal)."""
    for line in host.read("proc/stat").splitlines():
        words = line.split()
        if words[0] == f"cpu{cpu}":
            return sum(map(int, words[6:9])) / _TICKS
    return 0.0


def _mapping(
    head: re.Match[str], fields: dict[str, str], flags: frozenset[str], numa: dict[int, tuple[str, tuple[tuple[int, int], ...]]]
) -> Mapping:
    def size(key: str) -> int:
        return int(fields.get(key, "0").split()[0]) << 10

    policy, nodes = numa.get(int(head[1], 16), ("", ()))
    return Mapping(
        int(head[1], 16), int(head[2], 16), head[5], int(head[4], 16), size("KernelPageSize"), size("Rss"),
        size("Shared_Hugetlb") + size("Private_Hugetlb"), flags, policy, nodes,
    )  # fmt: skip
