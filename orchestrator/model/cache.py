"""Parts of caches and limits of memory bandwidth, which the CPU enforces (Documentation/arch/x86/resctrl.rst). Pure.

The kernel's terms: a *way* is one bit of a capacity bit mask, a *control group* is a folder of resctrl.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.values import CpuSet

BANDWIDTH = "MB"
"""The line of a schemata file with the limits of memory bandwidth."""
_LIMIT = re.compile(r"([1-9][0-9]{0,8})(%|MB/s)", re.ASCII)
_EIGHTHS = 8  # AMD: the unit is 1/8 GB/s (AMD64 QoS extensions, 56375, section 3.3.4)


class BandwidthUnit(StrEnum):
    """The unit of the values of an MB line of a schemata file."""

    PERCENT = "percent"
    """Intel's memory bandwidth allocation."""
    EIGHTH_GB = "1/8 GB/s"
    """AMD."""
    MEGABYTES = "MB/s"
    """resctrl mounted with the option mba_MBps."""


@dataclass(frozen=True)
class Bandwidth:
    """A limit as the user writes it: "40%" or "4000MB/s"."""

    amount: int
    percent: bool

    def __str__(self) -> str:
        return f"{self.amount}{'%' if self.percent else 'MB/s'}"


def parse_bandwidth(text: str) -> Bandwidth:
    """Raises ValueError."""
    match = _LIMIT.fullmatch(text)
    if not match or (match[2] == "%" and int(match[1]) > 100):
        raise ValueError(f"{text!r} is not a limit of memory bandwidth; use the form 40% or 4000MB/s")
    return Bandwidth(int(match[1]), match[2] == "%")


@dataclass(frozen=True)
class CacheDomain:
    """One cache, which some CPUs share (/sys/devices/system/cpu/cpuN/cache/indexM)."""

    level: int
    id: int
    cpus: CpuSet  # online


@dataclass(frozen=True)
class CacheControl:
    """Allocation of cache ways (CAT) at one level."""

    level: int
    lines: tuple[str, ...]  # the lines of a schemata file: "L3", or "L3CODE" and "L3DATA" with CDP
    full: int  # mask of all ways
    min_ways: int
    shared: int  # mask of the ways that devices use too
    sparse: bool  # masks may have gaps


@dataclass(frozen=True)
class BandwidthControl:
    """Limits of memory bandwidth (MBA), per L3 cache."""

    unit: BandwidthUnit
    minimum: int
    step: int
    maximum: int

    def convert(self, limit: Bandwidth) -> int:
        """The value for the kernel, as it rounds up to whole steps itself. Raises ValueError with the reason in one sentence."""
        if limit.percent is not (self.unit is BandwidthUnit.PERCENT):
            expected = "percent" if self.unit is BandwidthUnit.PERCENT else "MB/s"
            raise ValueError(f"this host limits memory bandwidth in {expected}, requested {limit}")
        value = -(-limit.amount * _EIGHTHS // 1000) if self.unit is BandwidthUnit.EIGHTH_GB else limit.amount
        value = -(-value // self.step) * self.step
        if not self.minimum <= value <= self.maximum:
            bounds = f"{self.describe(self.minimum)} to {self.describe(self.maximum)}"
            raise ValueError(f"a limit of {limit} is not possible on this host, only {bounds}")
        return value

    def describe(self, value: int) -> str:
        if self.unit is BandwidthUnit.PERCENT:
            return f"{value}%"
        return f"{value * 1000 // _EIGHTHS if self.unit is BandwidthUnit.EIGHTH_GB else value}MB/s"


@dataclass(frozen=True)
class ControlGroup:
    """A control group and its limits. ``name`` is empty for the default group, which has all other CPUs and tasks."""

    name: str
    schemata: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]  # (line, (cache id, value) in order)
    cpus: CpuSet = CpuSet()
    has_tasks: bool = False
    tasks: frozenset[int] = frozenset()  # ids of the threads that were put into it; not read of the default group

    def find(self, line: str, id: int) -> int | None:
        """None if the kernel does not show the line or the cache."""
        return dict(dict(self.schemata).get(line, ())).get(id)

    def ways(self, control: CacheControl, id: int) -> int:
        """Mask of the ways that the group may fill, as code or as data."""
        mask = 0
        for line in control.lines:
            mask |= self.find(line, id) or 0
        return mask


@dataclass(frozen=True)
class CacheSurvey:
    """What resctrl offers on this host. ``fault`` is the reason why it offers nothing, otherwise empty."""

    fault: str = ""
    cache: CacheControl | None = None
    bandwidth: BandwidthControl | None = None
    domains: tuple[CacheDomain, ...] = ()
    groups: tuple[ControlGroup, ...] = ()  # the default group is the first
    max_groups: int = 0  # CLOSIDs, the default group's included

    def find_domains(self, level: int, cpus: CpuSet) -> tuple[CacheDomain, ...]:
        return tuple(domain for domain in self.domains if domain.level == level and domain.cpus.meets(cpus))


@dataclass(frozen=True)
class CacheShare:
    """The ways of one cache that only the guest's cores fill."""

    id: int
    mask: int

    @property
    def ways(self) -> tuple[int, ...]:
        """Numbers of the ways."""
        return tuple(bit for bit in range(self.mask.bit_length()) if self.mask >> bit & 1)


@dataclass(frozen=True)
class CachePlan:
    """The guest's part of caches and memory bandwidth. Empty if the host cannot limit them and the guest accepts that."""

    level: int = 0  # of the caches in ``shares``
    shares: tuple[CacheShare, ...] = ()
    bandwidth: int | None = None  # None for no limit
    unit: BandwidthUnit | None = None  # of ``bandwidth``
    throttled: tuple[int, ...] = ()  # ids of the L3 caches where ``bandwidth`` applies

    @property
    def waived(self) -> bool:
        return not self.shares and self.bandwidth is None

    @property
    def keys(self) -> tuple[str, ...]:
        """One for each way: no two guests own the same one."""
        return tuple(f"L{self.level}:{share.id}:{way}" for share in self.shares for way in share.ways)


def name_group(guest: str) -> str:
    """The name of a guest's control group."""
    return f"nohype-{guest}"


def find_runs(mask: int) -> Iterator[int]:
    """The masks of the runs of neighbouring ways, the lowest first."""
    while mask:
        low = mask & -mask
        run = mask & ~(mask + low)
        yield run
        mask &= ~run


def describe_ways(mask: int) -> str:
    return f"{mask:#x} ({mask.bit_count()} ways)"
