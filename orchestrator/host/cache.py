"""Control groups of caches and memory bandwidth in resctrl (Documentation/arch/x86/resctrl.rst)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from errno import EEXIST, EINVAL, ENODEV, ENOENT, ENOSPC

from orchestrator.errors import HostError
from orchestrator.host.cpus import parse_cpus, read_online
from orchestrator.host.root import HostRoot
from orchestrator.model.cache import (
    BANDWIDTH,
    BandwidthControl,
    BandwidthUnit,
    CacheControl,
    CacheDomain,
    CacheSurvey,
    ControlGroup,
)
from orchestrator.values import CpuSet

RESCTRL = "sys/fs/resctrl"
_INFO = f"{RESCTRL}/info"
_CPUS = "sys/devices/system/cpu"
_NOT_GROUPS = ("info", "mon_data", "mon_groups")
_LINE = re.compile(r"\s*(\w+):(\d+=\w+(?:;\d+=\w+)*)\s*", re.ASCII)
_UNSET = re.compile(r"\s*\w+:uninitialized\s*", re.ASCII)
"""Of a group in the mode pseudo-locksetup (rdtgroup_schemata_show()): it has no ways yet."""
_MOUNT_HINT = "mount it: mount -t resctrl resctrl /sys/fs/resctrl"
_DECIMAL = (BANDWIDTH, "SMBA")  # the second: bandwidth of slow memory
_AMD = ("AuthenticAMD", "HygonGenuine")
_MAX_EIGHTHS = 2048  # the value that a group has on AMD until a limit is set
_REMOVED = (ENOENT, ENODEV)
"""Of a file whose group is removed: before it is opened, and after."""
_LOST = ("Unavailable", "Error", "Unassigned")
"""What a counter shows instead of a number."""


def read_caches(host: HostRoot) -> CacheSurvey:
    """As ``read_limits``, with the caches and their CPUs: that takes some ten files per CPU."""
    survey = read_limits(host)
    return survey if survey.fault else replace(survey, domains=_read_domains(host))


def read_limits(host: HostRoot) -> CacheSurvey:
    """What can be limited, and all control groups, without ``domains``. ``fault`` explains why nothing can be limited.

    Raises HostError for unreadable files.
    """
    if not host.exists(RESCTRL):
        return CacheSurvey("the CPUs or the kernel cannot limit caches and memory bandwidth (/sys/fs/resctrl does not exist)")
    if not host.exists(_INFO):
        return CacheSurvey(f"resctrl is not mounted; {_MOUNT_HINT}")
    resources = host.names(_INFO)
    cache = next((found for level in (3, 2) if (found := _read_control(host, level, resources))), None)
    bandwidth = _read_bandwidth(host) if BANDWIDTH in resources else None
    if not cache and not bandwidth:
        return CacheSurvey("the CPUs can monitor caches and memory bandwidth, but not limit them (/sys/fs/resctrl/info)")
    # closid_init(): a group takes one of each resource, also of those that the manager does not limit.
    counts = [f"{_INFO}/{resource}/num_closids" for resource in resources]
    most = min(_read_number(host, file) for file in counts if host.exists(file))
    return CacheSurvey("", cache, bandwidth, groups=read_groups(host), max_groups=most)


def is_visible(host: HostRoot) -> bool:
    """Whether /sys shows file systems of the kernel: without them, a missing resctrl means nothing."""
    return host.exists("sys/fs")


def read_groups(host: HostRoot) -> tuple[ControlGroup, ...]:
    """The default group first. A group that is removed meanwhile is left out."""
    found = [_read_group(host, "")]
    for name in host.names(RESCTRL):
        if name not in _NOT_GROUPS and host.exists(f"{RESCTRL}/{name}/schemata"):
            try:
                found.append(_read_group(host, name))
            except HostError as error:
                if error.errno not in _REMOVED:
                    raise
    return tuple(found)


def find_group(host: HostRoot, name: str) -> ControlGroup | None:
    return _read_group(host, name) if host.exists(f"{_folder(name)}/schemata") else None


def make_group(host: HostRoot, name: str) -> None:
    """No-op if it exists. Raises HostError with the reason that the kernel gives."""
    try:
        host.make_folder(_folder(name))
    except HostError as error:
        if error.errno == ENOENT:
            raise HostError("resctrl is not mounted", _MOUNT_HINT, ENOENT) from None
        if error.errno == ENOSPC:
            hint = "remove control groups that are not needed: ls /sys/fs/resctrl"
            raise HostError(f"cannot create the control group {name}: all are in use", hint, ENOSPC) from None
        if error.errno != EEXIST:
            raise _explain(host, error) from None


def remove_group(host: HostRoot, name: str) -> None:
    """Its CPUs and tasks return to the default group. No-op if it does not exist."""
    try:
        host.remove_folder(_folder(name))
    except HostError as error:
        if error.errno != ENOENT:
            raise


def set_limits(host: HostRoot, name: str, limits: Mapping[str, Mapping[int, int]]) -> None:
    """Sets limits of a group by line and cache, and reads them back. Other limits stay."""
    lines = [
        f"{line}:{';'.join(f'{id}={_show(line, value)}' for id, value in sorted(of.items()))}" for line, of in limits.items()
    ]
    if not lines:
        return
    file = f"{_folder(name)}/schemata"
    try:
        host.write(file, "\n".join(lines) + "\n")
    except HostError as error:
        raise _explain(host, error) from None
    group = _read_group(host, name)
    for line, of in limits.items():
        for id, value in of.items():
            if (now := group.find(line, id)) != value:
                what = f"{_show(line, value)} was written for {line}:{id} to /{file}, but it is"
                raise HostError(f"{what} {'absent' if now is None else _show(line, now)}")


def set_cpus(host: HostRoot, name: str, cpus: CpuSet) -> None:
    """Gives CPUs to a group, from whichever groups have them; reads back."""
    file = f"{_folder(name)}/cpus_list"
    try:
        host.write(file, f"{cpus}\n")
    except HostError as error:
        raise _explain(host, error) from None
    if (now := parse_cpus(file, host.read(file))) != cpus:
        raise HostError(f"CPUs {cpus} were written to /{file}, but it has {now or 'none'}")


def read_use(host: HostRoot, name: str) -> dict[str, int]:
    """Bytes by counter, summed over all caches: llc_occupancy, mbm_total_bytes, mbm_local_bytes. Without counters that the CPUs
    do not have, or that the kernel cannot read now.
    """
    try:
        return _sum_counters(host, f"{_folder(name)}/mon_data")
    except HostError as error:
        if error.errno in _REMOVED:
            return {}
        raise


def _sum_counters(host: HostRoot, folder: str) -> dict[str, int]:
    sums: dict[str, int] = {}
    lost: set[str] = set()
    for domain in host.names(folder) if host.exists(folder) else ():
        if not domain.startswith("mon_L3_"):
            continue
        for counter in host.names(f"{folder}/{domain}"):
            if counter.startswith("mon_sub_"):  # a folder: the part of one node, with Sub-NUMA Cluster
                continue
            text = host.read(f"{folder}/{domain}/{counter}")
            if text.isdecimal():
                sums[counter] = sums.get(counter, 0) + int(text)
            elif text in _LOST:
                lost.add(counter)
    return {counter: value for counter, value in sums.items() if counter not in lost}


def _folder(name: str) -> str:
    return f"{RESCTRL}/{name}" if name else RESCTRL


def _explain(host: HostRoot, error: HostError) -> HostError:
    """Adds the kernel's own explanation of the last failed command."""
    try:
        status = " ".join((host.find(f"{_INFO}/last_cmd_status") or "").split())
    except HostError:
        status = ""
    if not status or status == "ok":
        return error
    return HostError(f"{error.message}: {status}", "check which program changes /sys/fs/resctrl", error.errno or EINVAL)


def _read_control(host: HostRoot, level: int, resources: Iterable[str]) -> CacheControl | None:
    lines = tuple(line for line in (f"L{level}", f"L{level}CODE", f"L{level}DATA") if line in resources)
    if not lines:
        return None
    folder = f"{_INFO}/{lines[0]}"
    return CacheControl(
        level,
        lines,
        full=_read_mask(host, f"{folder}/cbm_mask"),
        min_ways=_read_number(host, f"{folder}/min_cbm_bits"),
        shared=_read_mask(host, f"{folder}/shareable_bits"),
        sparse=(host.find(f"{folder}/sparse_masks") or "0") == "1",
    )


def _read_bandwidth(host: HostRoot) -> BandwidthControl:
    folder = f"{_INFO}/{BANDWIDTH}"
    minimum, step = _read_number(host, f"{folder}/min_bandwidth"), _read_number(host, f"{folder}/bandwidth_gran")
    mounts = (line.split() for line in host.read("proc/self/mounts").splitlines())
    if any("mba_MBps" in fields[3].split(",") for fields in mounts if len(fields) > 3 and fields[2] == "resctrl"):
        return BandwidthControl(BandwidthUnit.MEGABYTES, minimum, step, (1 << 32) - 1)
    vendor = re.search(r"^vendor_id\s*: (\w+)", host.read_bytes("proc/cpuinfo")[:4096].decode(errors="replace"), re.MULTILINE)
    if vendor and vendor[1] in _AMD:
        return BandwidthControl(BandwidthUnit.EIGHTH_GB, minimum, step, _MAX_EIGHTHS)
    return BandwidthControl(BandwidthUnit.PERCENT, minimum, step, 100)


def _read_domains(host: HostRoot) -> tuple[CacheDomain, ...]:
    """The L2 and L3 caches of data, by level and id."""
    online = read_online(host)
    found: dict[tuple[int, int], set[int]] = {}
    for cpu in online:
        folder = f"{_CPUS}/cpu{cpu}/cache"
        for index in host.names(folder) if host.exists(folder) else ():
            level = host.find(f"{folder}/{index}/level") if index.startswith("index") else None
            if level in ("2", "3") and host.read(f"{folder}/{index}/type") != "Instruction":
                id = host.find(f"{folder}/{index}/id")  # absent where the kernel does not know it
                if id is not None and id.isdecimal():
                    found.setdefault((int(level), int(id)), set()).add(cpu)
    return tuple(CacheDomain(level, id, CpuSet.of(cpus)) for (level, id), cpus in sorted(found.items()))


def _read_group(host: HostRoot, name: str) -> ControlGroup:
    folder = _folder(name)
    schemata: list[tuple[str, tuple[tuple[int, int], ...]]] = []
    for text in host.read(f"{folder}/schemata").splitlines():
        if _UNSET.fullmatch(text):
            continue
        match = _LINE.fullmatch(text)
        if not match:
            raise HostError(f"cannot parse /{folder}/schemata: {text!r}", "report this: the kernel is newer than the manager")
        schemata.append((match[1], tuple(_parse_limit(f"{folder}/schemata", match[1], pair) for pair in match[2].split(";"))))
    cpus = parse_cpus(f"{folder}/cpus_list", host.read(f"{folder}/cpus_list"))
    tasks = host.read(f"{folder}/tasks").split() if name else []
    return ControlGroup(name, tuple(schemata), cpus, bool(tasks), frozenset(int(task) for task in tasks if task.isdecimal()))


def _parse_limit(file: str, line: str, pair: str) -> tuple[int, int]:
    id, _, value = pair.partition("=")
    try:
        return int(id), int(value, 10 if line in _DECIMAL else 16)
    except ValueError:
        raise HostError(f"cannot parse /{file}: {pair!r} is not a limit") from None


def _show(line: str, value: int) -> str:
    return str(value) if line == BANDWIDTH else f"{value:x}"


def _read_mask(host: HostRoot, file: str) -> int:
    return _parse(file, host.read(file), 16)


def _read_number(host: HostRoot, file: str) -> int:
    return _parse(file, host.read(file), 10)


def _parse(file: str, text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise HostError(f"cannot parse /{file}: {text!r} is not a number") from None
