"""Threads, memory maps and open files of processes (proc_pid_stat(5), Documentation/filesystems/proc.rst). Reads only."""

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

# include/linux/sched.h; both flags have had these values since 2.6.24 and 3.10.
_PF_KTHREAD = 0x0020_0000
_PF_NO_SETAFFINITY = 0x0400_0000
# fs/proc/array.c, do_task_stat(): USER_HZ, which is 100 on x86 for every CONFIG_HZ.
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGESIZE")
_HUGETLB = re.compile(r"^HugetlbPages:\s*(\d+) kB", re.MULTILINE | re.ASCII)
_SMAPS_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ *(.*)$", re.ASCII)
_LINE = re.compile(r".+")
_EXEC_START = re.compile(r"^se\.exec_start\s*:\s*([0-9.]+)", re.MULTILINE)
_MACHINE = re.compile(r"(\d+)-\d+", re.ASCII)
_PAGEMAP_PRESENT = 1 << 63
_PAGEMAP_FRAME = (1 << 55) - 1


@dataclass(frozen=True)
class Thread:
    pid: int
    tid: int
    name: str  # `comm`: at most 15 characters for user threads
    allowed: CpuSet
    last_cpu: int  # where it last ran or was queued
    kernel: bool
    pinned_by_kernel: bool  # PF_NO_SETAFFINITY: it cannot be moved
    started: float  # seconds after boot

    def __str__(self) -> str:
        return f"{self.name} ({self.tid} of process {self.pid})" if self.tid != self.pid else f"{self.name} ({self.pid})"


@dataclass(frozen=True)
class Mapping:
    """A memory mapping: /proc/PID/smaps joined with /proc/PID/numa_maps by start address. Sizes in bytes."""

    start: int
    end: int
    path: str  # file, or the kernel's name in brackets; empty for anonymous memory
    offset: int
    page_size: int
    resident: int  # `Rss`, which does not include huge pages of a pool
    huge: int  # huge pages of a pool: `Shared_Hugetlb` and `Private_Hugetlb`
    flags: frozenset[str]  # two-letter `VmFlags`: `lo` locked, `ht` pool page, `mg` mergeable, `io`, `pf`, ...
    policy: str  # NUMA policy, "bind:0"
    nodes: tuple[tuple[int, int], ...]  # (node, number of pages of `page_size`)


@dataclass(frozen=True)
class Maps:
    mappings: tuple[Mapping, ...]
    locked: int  # VmLck of /proc/PID/status, in bytes


def read_boot_id(host: HostRoot) -> str:
    """Changes at each boot (random(4))."""
    return host.read("proc/sys/kernel/random/boot_id")


def read_arguments(host: HostRoot, pid: int) -> tuple[str, ...]:
    return tuple(host.read_bytes(f"proc/{pid}/cmdline").decode(errors="replace").rstrip("\0").split("\0"))


def find_comm(host: HostRoot, tid: int) -> str | None:
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
    # Most threads share a few CPU sets, whose texts are long on a large host.
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
    """No threads if the process has ended."""
    known: dict[str, CpuSet] = {}
    found = (_read_thread(host, pid, tid, known) for tid in _read_tids(host, pid))
    return tuple(thread for thread in found if thread)


def read_last_run(host: HostRoot, thread: Thread) -> float | None:
    """An upper bound, in seconds after boot, for the thread's last run; None if the kernel does not report it."""
    # se.exec_start (CONFIG_SCHED_DEBUG) is the run queue's task clock in ms. It stops while the CPU serves interrupts or
    # is stolen (kernel/sched/core.c, update_rq_clock_task): that time is added. It is 0 after a wake-up on another CPU, and for
    # threads outside the fair class.
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
    """Bytes of huge pages of all pools by process id (`HugetlbPages`, proc_pid_status(5)), without processes that have none."""
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
    numa = parse_numa_maps(host.read(f"proc/{pid}/numa_maps"))
    locked = re.search(r"^VmLck:\s*(\d+) kB", host.read(f"proc/{pid}/status"), re.MULTILINE)
    if not locked:
        raise HostError(f"cannot parse /proc/{pid}/status: no VmLck", "zombies and kernel threads have no memory")
    return Maps(tuple(parse_smaps(host.read(f"proc/{pid}/smaps"), numa)), int(locked[1]) << 10)


def parse_numa_maps(text: str) -> dict[int, tuple[str, tuple[tuple[int, int], ...]]]:
    """NUMA policy and (node, pages) by start address, from /proc/PID/numa_maps."""
    result = {}
    for line in text.splitlines():
        start, policy, *words = line.split()
        pages = [word[1:].split("=") for word in words if re.fullmatch(r"N\d+=\d+", word, re.ASCII)]
        result[int(start, 16)] = (policy, tuple((int(node), int(count)) for node, count in pages))
    return result


def parse_smaps(text: str, numa: dict[int, tuple[str, tuple[tuple[int, int], ...]]]) -> Iterator[Mapping]:
    """A mapping that is not in `numa`, which is read a moment earlier, gets no policy and no nodes."""
    head: re.Match[str] | None = None
    fields: dict[str, str] = {}
    # QEMU has hundreds of mappings of some 20 lines each, and Python rarely returns memory to the kernel: iterate without a list
    # of lines, and share the few distinct sets of flags.
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
    """Host physical address of each virtual address, None if no page is present (Documentation/admin-guide/mm/pagemap.rst).
    Raises HostError without CAP_SYS_ADMIN: the kernel then shows page frames as 0.
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
    """Targets of the open descriptors: paths, `anon_inode:kvm-vm`, `socket:[123]`."""
    targets = (host.target(f"proc/{pid}/fd/{name}") for name in host.names(f"proc/{pid}/fd"))
    return tuple(target for target in targets if target is not None)


def read_machine_owners(host: HostRoot) -> tuple[int, ...]:
    """Thread ids that have created virtual machines of KVM which exist now: of QEMU the process id.

    Raises HostError if the kernel does not show them.
    """
    # virt/kvm/kvm_main.c, kvm_create_vm_debugfs(): a folder PID-FD per machine, next to counters of all machines.
    matches = (_MACHINE.fullmatch(name) for name in host.names("sys/kernel/debug/kvm"))
    return tuple(sorted({int(match[1]) for match in matches if match}))


def read_services(host: HostRoot, units: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Process ids per systemd unit, by cgroup; empty for units that do not run."""
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
        # ESRCH: the thread exited between open(2) and read(2).
        if error.errno in (ENOENT, ESRCH):
            return None
        raise
    return _parse_thread(pid, tid, stat, status, known)


def _parse_thread(pid: int, tid: int, stat: str, status: str, known: dict[str, CpuSet]) -> Thread | None:
    """None for a thread that has already exited (zombie). Adds to `known`: CPU sets by their text."""
    try:
        # The name may contain spaces and parentheses: it ends at the last closing one (proc_pid_stat(5)).
        name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        if fields[0] in "ZX":
            return None
        # A regular expression would try each position of a long text, for thousands of threads.
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
    # Seconds since boot (proc_stat(5): irq, softirq, steal).
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
