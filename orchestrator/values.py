"""Small immutable values with parse and format. Kernel and libvirt spellings are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from orchestrator.errors import RequestError

DEFAULT_SOCKET = Path("/run/nohype/nohyped.sock")
"""Where the manager serves. Here, not in `config`: `nohype` would have to import pydantic for it, which doubles its start."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d{1,15})\s*(?:([KMGT])(?:i?B)?|B)?", re.ASCII)
_PCI = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", re.ASCII)
MOST_CPUS = 8192
"""More than any kernel has (NR_CPUS, arch/x86/Kconfig)."""

_CPU_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


@dataclass(frozen=True)
class CpuSet:
    """A set of CPU numbers; ``parse`` and ``str`` use the kernel's list format (cpuset(7), "0-3,8")."""

    ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, ids: Iterable[int]) -> CpuSet:
        """Makes a set from CPU numbers."""
        return cls(frozenset(ids))

    @classmethod
    def parse(cls, text: str) -> CpuSet:
        """Reads the kernel's list format.

        Raises:
            RequestError: the text is no CPU list, or names more than any kernel has (8192: NR_CPUS, arch/x86/Kconfig).
        """
        ids: list[int] = []
        for part in filter(None, text.strip().split(",")):
            match = _CPU_RANGE.fullmatch(part.strip())
            if not match or int(match[2] or match[1]) < int(match[1]):
                raise RequestError(f"{_shorten(text)} is not a list of CPUs", "write it like 0-3,8")
            first, last = int(match[1]), int(match[2] or match[1])
            # Before they are counted out: a short text can name very many.
            if last >= MOST_CPUS or len(ids) + last - first >= MOST_CPUS:
                raise RequestError(f"{_shorten(text)} names more CPUs than any kernel has", "write it like 0-3,8")
            ids.extend(range(first, last + 1))
        return cls(frozenset(ids))

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        # Kept: thousands of threads share a few sets, and each is named in what is said of it.
        parts: list[str] = []
        first = last = -1
        for cpu in [*sorted(self.ids), MOST_CPUS]:
            if cpu != last + 1 or first < 0 or cpu == MOST_CPUS:
                if first >= 0:
                    parts.append(str(first) if first == last else f"{first}-{last}")
                first = cpu
            last = cpu
        return ",".join(parts)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def meets(self, other: CpuSet) -> bool:
        """Whether the two have a CPU in common; cheaper than to make the set of those."""
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
    """An amount of memory in bytes. Units are binary: 1K = 1024 bytes."""

    bytes: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Reads ``256M``, ``2MiB``, ``1 G``; a bare number is bytes.

        Raises:
            RequestError: the text is no size, or zero.
        """
        match = _SIZE.fullmatch(text.strip())
        if not match or not int(match[1]):
            raise RequestError(f"{text!r} is not a size", "write it like 256M or 1G; units are K, M, G, T (binary)")
        return cls(int(match[1]) * _UNITS[match[2] or ""])

    def __str__(self) -> str:
        for unit, factor in reversed(_UNITS.items()):
            if self.bytes and self.bytes % factor == 0:
                return f"{self.bytes // factor}{unit}"
        return str(self.bytes)

    @property
    def kib(self) -> int:
        """The size in units of 1024 bytes, rounded down."""
        return self.bytes >> 10


@dataclass(frozen=True, order=True)
class PciAddress:
    """A PCI function: domain, bus, device, function (``0000:01:10.3``)."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """Reads ``0000:01:10.3``; the domain may be left out.

        Raises:
            RequestError: the text is no PCI address.
        """
        match = _PCI.fullmatch(text.strip().lower())
        if not match:
            raise RequestError(f"{text!r} is not a PCI address", "write it like 0000:01:10.3")
        return cls(*(int(part or "0", 16) for part in match.groups()))

    def offset(self, routing_ids: int) -> PciAddress:
        """The function this many routing ids further on: how SR-IOV numbers VFs (PCIe base specification 9.2.1.2)."""
        routing_id = (self.bus << 8 | self.device << 3 | self.function) + routing_ids
        return PciAddress(self.domain, routing_id >> 8, routing_id >> 3 & 0x1F, routing_id & 7)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"


@dataclass(frozen=True, order=True)
class MacAddress:
    """An Ethernet address, lower case with colons."""

    text: str

    @classmethod
    def parse(cls, text: str) -> MacAddress:
        """Reads ``52:54:00:00:00:01``.

        Raises:
            RequestError: the text is no unicast Ethernet address.
        """
        lowered = text.strip().lower()
        if not _MAC.fullmatch(lowered) or int(lowered[:2], 16) & 1 or lowered == "00:00:00:00:00:00":
            raise RequestError(f"{text!r} is not a unicast Ethernet address", "write it like 02:4e:48:00:00:01")
        return cls(lowered)

    def __str__(self) -> str:
        return self.text


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def parse_guest_name(text: str) -> str:
    """Checks the name of a guest: 1 to 40 of a-z, 0-9 and inner hyphens (a DNS label, so it can be a host name too).

    Raises:
        RequestError: the name is not of that form.
    """
    if not _NAME.fullmatch(text):
        raise RequestError(f"{text!r} is not a guest name", "use 1 to 40 of a-z, 0-9 and, inside, hyphens")
    return text
