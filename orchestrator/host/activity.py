"""What ran on CPUs beside their threads' own work: interrupts, softirqs and time slices, as the kernel counts them since boot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from errno import ENOENT, ESRCH

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

# Numbers of a line "cpuN ..." of /proc/schedstat since version 12 (Documentation/scheduler/sched-stats.rst).
_SCHEDSTAT_FIELDS = 9

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Activity:
    """Counters of some CPUs, summed over them."""

    interrupts: Counts  # by the first word of the line of /proc/interrupts: a number, or "LOC"
    softirqs: Counts  # by name
    slices: int | None  # time slices of all threads; None on a kernel that does not count them (CONFIG_SCHEDSTATS)
    names: Mapping[str, str]  # of interrupts: the rest of the line


def read_activity(host: HostRoot, cpus: CpuSet) -> Activity:
    """Raises HostError if a file cannot be read, or does not show one of the CPUs: it is offline."""
    interrupts, names = parse_interrupts(host.read("proc/interrupts"), cpus)
    return Activity(interrupts, parse_softirqs(host.read("proc/softirqs"), cpus), _read_slices(host, cpus), names)


def parse_interrupts(text: str, cpus: CpuSet) -> tuple[dict[str, int], dict[str, str]]:
    """Counts and names by line. Lines with one number for all CPUs (such as ERR) are left out."""
    head, _, rest = text.partition("\n")
    columns = _find_columns("proc/interrupts", head, cpus)
    width = len(head.split())
    counts, names = {}, {}
    for line in rest.splitlines():
        label, _, body = line.partition(":")
        words = body.split(None, width)
        # Only the columns that are used: a large host has millions of numbers.
        if len(words) < width or not all(words[column].isdecimal() for column in (0, width - 1, *columns)):
            continue
        counts[label.strip()] = sum(int(words[column]) for column in columns)
        names[label.strip()] = " ".join("".join(words[width:]).split())
    if not counts:
        raise HostError("cannot parse /proc/interrupts: no line has a number for each CPU")
    return counts, names


def parse_softirqs(text: str, cpus: CpuSet) -> dict[str, int]:
    head, _, rest = text.partition("\n")
    columns = _find_columns("proc/softirqs", head, cpus)
    counts = {}
    for line in rest.splitlines():
        name, _, body = line.partition(":")
        words = body.split()
        try:
            counts[name.strip()] = sum(int(words[column]) for column in columns)
        except (IndexError, ValueError):
            raise HostError(f"cannot parse /proc/softirqs: {line!r}") from None
    return counts


def _find_columns(name: str, head: str, cpus: CpuSet) -> list[int]:
    columns = {word: column for column, word in enumerate(head.split())}
    if missing := [cpu for cpu in cpus if f"CPU{cpu}" not in columns]:
        raise HostError(f"/{name} does not show CPUs {CpuSet.of(missing)}", "check that they are online")
    return [columns[f"CPU{cpu}"] for cpu in cpus]


def _read_slices(host: HostRoot, cpus: CpuSet) -> int | None:
    text = host.find("proc/schedstat")
    if text is None:
        return None
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, *numbers = line.split() or [""]
        if name.startswith("cpu") and name[3:].isdecimal() and len(numbers) == _SCHEDSTAT_FIELDS:
            found[name] = int(numbers[-1])
    if missing := [cpu for cpu in cpus if f"cpu{cpu}" not in found]:
        raise HostError(f"/proc/schedstat does not show CPUs {CpuSet.of(missing)}", "check that they are online")
    return sum(found[f"cpu{cpu}"] for cpu in cpus)


@dataclass(frozen=True)
class ThreadTimes:
    """Of one thread since it began, in seconds (Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat")."""

    ran: float
    waited: float  # ready to run while its CPU did something else


def read_thread_slices(host: HostRoot, threads: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Time slices of threads (process id, thread id) since they began, by thread id, without threads that have ended.

    Raises HostError if the kernel does not count them (CONFIG_SCHED_INFO).
    """
    return {tid: numbers[2] for tid, numbers in _read_schedstats(host, threads)}


def read_thread_times(host: HostRoot, threads: Iterable[tuple[int, int]]) -> dict[int, ThreadTimes]:
    """By thread id, as ``read_thread_slices`` reads them."""
    return {tid: ThreadTimes(numbers[0] / 1e9, numbers[1] / 1e9) for tid, numbers in _read_schedstats(host, threads)}


def _read_schedstats(host: HostRoot, threads: Iterable[tuple[int, int]]) -> Iterator[tuple[int, tuple[int, int, int]]]:
    for pid, tid in threads:
        name = f"proc/{pid}/task/{tid}/schedstat"
        try:
            ran, waited, slices = map(int, host.read(name).split())
        except HostError as error:
            if error.errno in (ENOENT, ESRCH) and not host.exists(f"proc/{pid}/task/{tid}"):
                continue
            raise
        except ValueError:
            raise HostError(f"cannot parse /{name}") from None
        yield tid, (ran, waited, slices)
