"""What libvirt domains that the manager did not create use of the host, from their XML (libvirt.org/formatdomain.html). Pure.

Whatever of the XML is odd is named in ``problem`` and left out: one domain stops nothing that does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from lxml import etree

from orchestrator.errors import RequestError
from orchestrator.values import CpuSet, PciAddress, Size

_PINS = ("cputune/vcpupin", "cputune/emulatorpin", "cputune/iothreadpin", "vcpu")
"""Elements whose attribute ``cpuset`` says where threads of the domain run; ``vcpu`` is the default of the others."""

_FUNCTIONS = (
    "devices/hostdev[@type='pci']/source/address",
    "devices/interface[@type='hostdev']/source/address",
    "devices/disk[@type='nvme']/source/address",
)
"""Elements that name a PCI function of the host which the domain owns while it runs."""

_MACVTAP = "devices/interface[@type='direct']/source"


@dataclass(frozen=True)
class Unmanaged:
    """A libvirt domain that the manager did not create.

    Attributes:
        running: False for one that is defined but shut off: it uses nothing yet, and all of it when it is started.
        pins: each set of host CPUs that the XML pins some of its threads to.
        nodes: NUMA nodes that its memory comes from (``numatune``); libvirt may start QEMU on their CPUs.
        hostdevs: the host's PCI functions that it owns while it runs.
        interfaces: the host's network interfaces that it stands on while it runs (macvtap).
        memory: None if the XML does not tell.
        pid: QEMU's process id, None if it does not run or libvirt does not tell.
        problem: what of it could not be read; empty if all could.
    """

    name: str
    uuid: UUID
    running: bool
    pins: tuple[CpuSet, ...] = ()
    nodes: frozenset[int] = frozenset()
    hostdevs: frozenset[PciAddress] = frozenset()
    interfaces: frozenset[str] = frozenset()
    memory: Size | None = None
    pid: int | None = None
    problem: str = ""

    def __str__(self) -> str:
        return f"unmanaged domain {self.name}" + ("" if self.running else " (shut off)")


def parse_unmanaged(domain: Unmanaged, xml: str) -> Unmanaged:
    """The domain with what its XML says."""
    try:
        tree: Any = etree.fromstring(xml.encode())
    except (etree.XMLSyntaxError, ValueError) as error:
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
    """A CPU or node set as libvirt writes it: the kernel's list format, and ``^N`` takes a number out again.

    Raises:
        RequestError: the text is of another form.
    """
    parts = [part.strip() for part in text.split(",")]
    excluded = CpuSet.parse(",".join(part[1:] for part in parts if part.startswith("^")))
    return CpuSet.parse(",".join(part for part in parts if not part.startswith("^"))) - excluded


def _parse_functions(tree: Any, problems: list[str]) -> Iterator[PciAddress]:
    for path in _FUNCTIONS:
        for source in tree.iterfind(path):
            try:
                # libvirt leaves the domain out where it is 0, in XML that is not live.
                parts = (source.get("domain", "0"), source.get("bus"), source.get("slot"), source.get("function", "0"))
                yield PciAddress(*(int(part, 0) for part in parts))
            except (TypeError, ValueError):
                problems.append(f"a PCI address is not understood: {etree.tostring(source, encoding='unicode').strip()}")


_UNITS = {"b": 1, "bytes": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"k": 10, "KiB": 10, "M": 20, "MiB": 20, "G": 30, "GiB": 30, "T": 40, "TiB": 40}


def _parse_memory(tree: Any, problems: list[str]) -> Size | None:
    element = tree.find("memory")
    unit = "KiB" if element is None else element.get("unit", "KiB")
    try:
        factor = _UNITS[unit] if unit in _UNITS else 1 << _BINARY[unit]
        return Size(int(element.text) * factor)
    except (AttributeError, KeyError, TypeError, ValueError):
        problems.append("it has no memory size that is understood")
        return None
