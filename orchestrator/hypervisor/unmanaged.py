"""The resources of unmanaged libvirt domains, from their XML (libvirt.org/formatdomain.html). Pure.

Elements that cannot be parsed are left out and named in `problem`: one domain must not prevent unrelated requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

from orchestrator.errors import RequestError
from orchestrator.values import CpuSet, PciAddress, Size

# Elements with an attribute `cpuset` for threads of the domain; `vcpu` has the default for the other elements.
_PINS = ("cputune/vcpupin", "cputune/emulatorpin", "cputune/iothreadpin", "vcpu")
# Elements with a PCI function of the host that the domain owns while it runs.
_FUNCTIONS = (
    "devices/hostdev[@type='pci']/source/address",
    "devices/interface[@type='hostdev']/source/address",
    "devices/disk[@type='nvme']/source/address",
)
_MACVTAP = "devices/interface[@type='direct']/source"


@dataclass(frozen=True)
class Unmanaged:
    """A libvirt domain that the manager did not create."""

    name: str
    uuid: UUID
    running: bool  # False: defined but shut off, so it uses its resources only after a start
    pins: tuple[CpuSet, ...] = ()  # each set of host CPUs to which threads are pinned
    nodes: frozenset[int] = frozenset()  # NUMA nodes of its memory (`numatune`); libvirt may start QEMU on their CPUs
    hostdevs: frozenset[PciAddress] = frozenset()
    interfaces: frozenset[str] = frozenset()  # host interfaces below its macvtap devices
    memory: Size | None = None  # None if the XML does not contain it
    pid: int | None = None  # QEMU's process id, None if it does not run or is not known
    problem: str = ""  # what could not be read

    def __str__(self) -> str:
        return f"unmanaged domain {self.name}" + ("" if self.running else " (shut off)")


def parse_unmanaged(domain: Unmanaged, xml: str) -> Unmanaged:
    try:
        tree: Any = ElementTree.fromstring(xml.encode())
    except (ElementTree.ParseError, ValueError) as error:
        return replace(domain, problem=f"its XML cannot be parsed: {error}")
    problems: list[str] = []
    pins = [element.get("cpuset") for path in _PINS for element in tree.iterfind(path) if element.get("cpuset")]
    nodesets = [element.get("nodeset") for element in tree.iterfind("numatune/*") if element.get("nodeset")]
    return replace(
        domain,
        pins=tuple(dict.fromkeys(_parse_sets(pins, problems))),
        nodes=frozenset(node for nodes in _parse_sets(nodesets, problems) for node in nodes),
        hostdevs=frozenset(_parse_functions(tree, problems)),
        interfaces=frozenset(filter(None, (source.get("dev") for source in tree.iterfind(_MACVTAP)))),
        memory=_parse_memory(tree, problems),
        problem="; ".join(problems),
    )


def _parse_sets(texts: list[str], problems: list[str]) -> Iterator[CpuSet]:
    for text in texts:
        try:
            yield parse_cpuset(text)
        except RequestError as error:
            problems.append(error.message)


def parse_cpuset(text: str) -> CpuSet:
    """libvirt's format of a CPU or node set: the kernel's list format, and `^N` removes a number."""
    parts = [part.strip() for part in text.split(",")]
    excluded = CpuSet.parse(",".join(part[1:] for part in parts if part.startswith("^")))
    return CpuSet.parse(",".join(part for part in parts if not part.startswith("^"))) - excluded


def _parse_functions(tree: Any, problems: list[str]) -> Iterator[PciAddress]:
    for path in _FUNCTIONS:
        for source in tree.iterfind(path):
            try:
                # libvirt omits domain 0 in the XML of domains that are shut off.
                parts = (source.get("domain", "0"), source.get("bus"), source.get("slot"), source.get("function", "0"))
                yield PciAddress(*(int(part, 0) for part in parts))
            except (TypeError, ValueError):
                shown = ElementTree.tostring(source, encoding="unicode").strip()
                problems.append(f"cannot parse the PCI address {shown}")


_UNITS = {"b": 1, "bytes": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"k": 10, "KiB": 10, "M": 20, "MiB": 20, "G": 30, "GiB": 30, "T": 40, "TiB": 40}


def _parse_memory(tree: Any, problems: list[str]) -> Size | None:
    element = tree.find("memory")
    unit = "KiB" if element is None else element.get("unit", "KiB")
    try:
        factor = _UNITS[unit] if unit in _UNITS else 1 << _BINARY[unit]
        return Size(int(element.text) * factor)
    except (AttributeError, KeyError, TypeError, ValueError):
        problems.append("cannot parse its memory size")
        return None
