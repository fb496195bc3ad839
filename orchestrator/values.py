"""Small immutable values with parse and format, in the formats of the kernel and libvirt. `parse` raises RequestError."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from orchestrator.errors import RequestError

DEFAULT_SOCKET = Path("/run/nohype/nohyped.sock")
# The manager's socket. Here, not in `config`, which imports pydantic: that doubles the start time of `nohype`.

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d{1,15})\s*(?:([KMGT])(?:i?B)?|B)?", re.ASCII)
_PCI = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}", re.ASCII)
NAME = r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?"
"""Regular expression of the names of guests, networks and switches."""
_NAME = re.compile(NAME, re.ASCII)
MAX_CPUS = 8192  # NR_CPUS, arch/x86/Kconfig
_MASK = re.compile(r"[0-9a-f]{1,8}(?:,[0-9a-f]{8})*", re.ASCII)
_CPU_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


@dataclass(frozen=True)
class CpuSet:
    """A set of CPU numbers, in the kernel's list format "0-3,8" (cpuset(7))."""

    ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, ids: Iterable[int]) -> CpuSet:
        return cls(frozenset(ids))

    @classmethod
    def parse(cls, text: str) -> CpuSet:
        ids: list[int] = []
        for part in filter(None, text.strip().split(",")):
            match = _CPU_RANGE.fullmatch(part.strip())
            if not match or int(match[2] or match[1]) < int(match[1]):
                raise RequestError(f"{_shorten(text)} is not a list of CPUs", "use the form 0-3,8")
            first, last = int(match[1]), int(match[2] or match[1])
            # Before the range is expanded: a short text can contain very many numbers.
            if last >= MAX_CPUS or len(ids) + last - first >= MAX_CPUS:
                what = f"{_shorten(text)} contains more CPUs than the kernel supports ({MAX_CPUS})"
                raise RequestError(what, "use the form 0-3,8")
            ids.extend(range(first, last + 1))
        return cls(frozenset(ids))

    @classmethod
    def parse_mask(cls, text: str) -> CpuSet:
        """Reads the kernel's mask format, hexadecimal in words of 32 bits: "ff" or "3,00000000" (cpuset(7))."""
        digits = text.strip().replace(",", "")
        if not _MASK.fullmatch(text.strip()) or len(digits) > MAX_CPUS // 4:
            raise RequestError(f"{_shorten(text)} is not a mask of CPUs", "use the form ff or 3,00000000")
        bits = int(digits, 16)
        return cls.of(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)

    @property
    def mask(self) -> str:
        """Inverse of ``parse_mask``, without leading zeros."""
        bits = sum(1 << cpu for cpu in self.ids)
        words: list[int] = []
        while bits or not words:
            words.append(bits & 0xFFFF_FFFF)
            bits >>= 32
        first, *rest = reversed(words)
        return ",".join((f"{first:x}", *(f"{word:08x}" for word in rest)))

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        # Cached: thousands of threads share a few sets.
        return format_ranges(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def meets(self, other: CpuSet) -> bool:
        """The sets have a common CPU."""
        return not self.ids.isdisjoint(other.ids)

    def __contains__(self, cpu: object) -> bool:
        return cpu in self.ids

    def __or__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.ids | other.ids)

    def __and__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.ids & other.ids)

    def __sub__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.ids - other.ids)

    def __le__(self, other: CpuSet) -> bool:
        return self.ids <= other.ids


@dataclass(frozen=True, order=True)
class Size:
    """An amount of memory. Units are binary: 1K = 1024 bytes."""

    bytes: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Accepts 256M, 2MiB and "1 G"; a number without a unit is bytes. Zero is an error."""
        match = _SIZE.fullmatch(text.strip())
        if not match or not int(match[1]):
            raise RequestError(f"{text!r} is not a size", "use the form 256M or 1G; units are K, M, G, T (binary)")
        return cls(int(match[1]) * _UNITS[match[2] or ""])

    def __str__(self) -> str:
        for unit, factor in reversed(_UNITS.items()):
            if self.bytes and self.bytes % factor == 0:
                return f"{self.bytes // factor}{unit}"
        return str(self.bytes)

    @property
    def kib(self) -> int:
        return self.bytes >> 10


@dataclass(frozen=True, order=True)
class PciAddress:
    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """Accepts 0000:01:10.3 and 01:10.3."""
        match = _PCI.fullmatch(text.strip().lower())
        if not match:
            raise RequestError(f"{text!r} is not a PCI address", "use the form 0000:01:10.3")
        return cls(*(int(part or "0", 16) for part in match.groups()))

    def offset(self, routing_ids: int) -> PciAddress:
        """The function `routing_ids` later; SR-IOV numbers VFs in this way (PCIe base specification 9.2.1.2)."""
        routing_id = (self.bus << 8 | self.device << 3 | self.function) + routing_ids
        return PciAddress(self.domain, routing_id >> 8, routing_id >> 3 & 0x1F, routing_id & 7)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"


@dataclass(frozen=True, order=True)
class MacAddress:
    text: str  # lower case, with colons

    @classmethod
    def parse(cls, text: str) -> MacAddress:
        lowered = text.strip().lower()
        if not _MAC.fullmatch(lowered) or int(lowered[:2], 16) & 1 or lowered == "00:00:00:00:00:00":
            raise RequestError(f"{text!r} is not a unicast Ethernet address", "use the form 02:4e:48:00:00:01")
        return cls(lowered)

    def __str__(self) -> str:
        return self.text


def format_ranges(numbers: Iterable[int]) -> str:
    """ "0-3,8" for 0, 1, 2, 3 and 8, in any order; empty without numbers."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def parse_guest_name(text: str) -> str:
    """The name is a DNS label, so that it can also be a host name."""
    if not _NAME.fullmatch(text):
        raise RequestError(f"{text!r} is not a guest name", "use 1 to 40 characters of a-z, 0-9 and inner hyphens")
    return text
