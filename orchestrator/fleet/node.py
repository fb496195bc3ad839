"""What a host offers to the fleet: one node of Slurm per NUMA node, made of exactly what guests can own. Pure.

A guest has cores and huge pages of one NUMA node, and Slurm counts memory per node. A host with two NUMA nodes is therefore two
nodes for Slurm. The CPUs of the manager are left out instead of being reserved (CpuSpecList): slurmd would bind itself to
reserved CPUs by its own numbering, which starts at the first core of the host and not of the NUMA node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.client.host_shapes import Host
from orchestrator.errors import HostError, RequestError
from orchestrator.fleet.apart import share_slots
from orchestrator.values import CpuSet, PciAddress, Size

SRIOV, EDGE, NETWORK, EMULATED_DISK = "sriov", "edge", "network-", "emulated-disk"
"""Features: the node has VFs; it has none, and a software edge; the host has the tenant network of the name that follows; its
manager offers emulated disks.
"""
_NUMA = re.compile(r"-n[0-9]+$")
_NOT_FOR_GUESTS = ("housekeeping", "unusable")
_NO_VF_EDGES = ("macvtap-vepa", "nft-vepa")


@dataclass(frozen=True)
class FleetNode:
    """A NUMA node of a host, as Slurm knows it.

    Attributes:
        name: Slurm's NodeName.
        numa: number of the NUMA node.
        cores: the CPUs of each core that guests can own, by Slurm's core index.
        threads: CPUs of each core for Slurm: its SMT threads, or 1 if the cores of the host differ.
        memory: MiB of huge pages that guests can own.
        page_size: bytes.
        vfs: PCI addresses, by Slurm's index of the resource.
        slots: for groups of guests, see `apart`.
        disks: NVMe controllers that guests can own, those that guests own now included.
        emulates_disks: the manager offers emulated disks.
    """

    name: str
    numa: int
    cores: tuple[CpuSet, ...]
    threads: int
    memory: int
    page_size: int
    vfs: tuple[PciAddress, ...]
    slots: tuple[int, ...] = ()
    disks: tuple[PciAddress, ...] = ()
    emulates_disks: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        return (
            SRIOV if self.vfs else EDGE, f"pages-{Size(self.page_size)}", *([EMULATED_DISK] if self.emulates_disks else [])
        )  # fmt: skip

    def map_cpus(self, abstract: CpuSet) -> CpuSet:
        """The host's CPUs for Slurm's ids: thread t of core c is c * threads + t, however Linux numbers the CPUs.

        Raises RequestError if an id is not of this node, or not all threads of a core are named.
        """
        indexes = sorted({cpu // self.threads for cpu in abstract})
        whole = CpuSet.of(index * self.threads + thread for index in indexes for thread in range(self.threads))
        if not abstract or abstract != whole or indexes[-1] >= len(self.cores):
            shape = f"{len(self.cores)} cores with {self.threads} threads"
            hint = "set SelectTypeParameters=CR_Core_Memory, and write the configuration of the host again: `nohype fleet config`"
            raise RequestError(
                f"Slurm allocated CPU ids {abstract or 'none'} on {self.name}, which are not whole cores of {shape}", hint
            )
        return CpuSet.of(cpu for index in indexes for cpu in self.cores[index])

    def map_vfs(self, indexes: CpuSet) -> tuple[PciAddress, ...]:
        """The VFs for Slurm's indexes (IDX). Raises RequestError if the node has fewer."""
        if missing := [index for index in indexes if index >= len(self.vfs)]:
            hint = "write the configuration of the host again: `nohype fleet config`"
            raise RequestError(f"Slurm allocated VF {missing[0]} of {self.name}, which has {len(self.vfs)} VFs", hint)
        return tuple(self.vfs[index] for index in indexes)


def check_feature(text: str) -> str:
    """Raises RequestError if it cannot be the name of a feature."""
    if not text.isascii() or not text.replace("-", "").replace("_", "").isalnum():
        raise RequestError(f"{text!r} is not a feature", "use letters, digits, - and _; `nohype fleet hosts` shows the features")
    return text


def is_of_survey(feature: str) -> bool:
    """Whether the survey of the host decides if a node has the feature."""
    return feature in (SRIOV, EDGE, EMULATED_DISK) or feature.startswith(("pages-", "cores-"))


def check_added_feature(text: str) -> str:
    """Raises RequestError if an operator cannot add the feature: it is not a name, or follows from what the host has."""
    if is_of_survey(check_feature(text)) or text.startswith(NETWORK):
        raise RequestError(
            f"feature {text} cannot be added: it follows from what the host has", "choose another name, such as rack-1"
        )
    return text


def find_host(node: str) -> str:
    """The name of the host of a node."""
    return _NUMA.sub("", node)


def build_nodes(host: Host, name: str, page_size: Size | None = None) -> tuple[FleetNode, ...]:
    """The nodes of a host; NUMA nodes that cannot have a guest are left out. ``name`` is the name of the host.

    With several nodes they are called NAME-n0, NAME-n1 by their NUMA nodes.

    Args:
        page_size: of the huge pages that the fleet uses; None for the only size that the host has.

    Raises:
        HostError: the host cannot have a guest of the fleet.
        RequestError: the host has pages of several sizes, and ``page_size`` is None.
    """
    size = page_size.bytes if page_size else _find_page_size(host)
    by_numa = {numa: _choose_cores(_list_cores(host, numa)) for numa in _list_numa(host)}
    threads = _count_threads(host)
    is_single = len(by_numa) == 1
    nodes = tuple(
        FleetNode(
            name if is_single else f"{name}-n{numa}", numa, cores, threads, _count_memory(host, numa, size), size,
            tuple(_list_vfs(host, numa, is_first=numa == min(by_numa))),
            disks=tuple(_list_disks(host, numa, is_first=numa == min(by_numa))), emulates_disks=host["emulated_disks"],
        )
        for numa, cores in by_numa.items() if cores
    )  # fmt: skip
    has_edge = any(uplink["edge"] in _NO_VF_EDGES for uplink in host["uplinks"])
    usable = tuple(node for node in nodes if node.memory and (node.vfs or has_edge))
    if not usable:
        raise HostError(f"host {name} cannot have a guest of the fleet: {_explain(nodes, Size(size), has_edge=has_edge)}", _HINT)
    return tuple(replace(node, slots=share_slots(number, len(usable))) for number, node in enumerate(usable))


def find_left_out(host: Host, nodes: Iterable[FleetNode]) -> tuple[str, ...]:
    """Which cores that the manager gives to guests are in none of the nodes of the host, and why: one sentence per NUMA node."""
    return tuple(_find_left_out(host, {node.numa: node for node in nodes}))


def _find_left_out(host: Host, nodes: Mapping[int, FleetNode]) -> Iterator[str]:
    for numa in _list_numa(host):
        cores = _list_cores(host, numa)
        if numa not in nodes and cores:
            yield f"NUMA node {numa}: it has no huge pages of the fleet's size, or neither VFs nor a software edge"
        elif numa in nodes and (others := CpuSet.of(cpu for core in cores for cpu in core if core not in nodes[numa].cores)):
            count = len(nodes[numa].cores[0])
            yield (
                f"CPUs {others} of NUMA node {numa}: the cores of a guest have the same number of threads, and the cores with"
                f" {count} have most of the CPUs"
            )


_HINT = "isolate cores, reserve huge pages and create the VFs when the host boots, see docs/fleet.md; `nohype survey` shows them"


def _explain(nodes: tuple[FleetNode, ...], size: Size, *, has_edge: bool) -> str:
    if not nodes:
        return "no core is isolated for guests"
    if not any(node.memory for node in nodes):
        return f"there are no huge pages of {size} for guests"
    assert not has_edge
    return "no uplink has VFs or a software edge"


def _find_page_size(host: Host) -> int:
    sizes = sorted({page["page_size"] for page in host["pages"] if page["count"]})
    if len(sizes) > 1:
        names = " and ".join(str(Size(size)) for size in sizes)
        raise RequestError(f"the host has huge pages of {names}; the fleet uses one size", "choose one with --page-size")
    return sizes[0] if sizes else Size.parse("2M").bytes


def _list_numa(host: Host) -> list[int]:
    return sorted({core["node"] for core in host["cores"]})


def _list_cores(host: Host, numa: int) -> tuple[CpuSet, ...]:
    """Those that guests can own, in Slurm's order: by socket, then by the first CPU of the core."""
    found = [(core["socket"], min(CpuSet.parse(core["cpus"])), core) for core in host["cores"] if core["node"] == numa]
    return tuple(
        CpuSet.parse(core["cpus"])
        for _, _, core in sorted(found, key=lambda item: item[:2])
        if core["use"] not in _NOT_FOR_GUESTS
    )


def _choose_cores(cores: Sequence[CpuSet]) -> tuple[CpuSet, ...]:
    """Those of the number of threads that has most CPUs: a CPU can be offline, and some processors have two kinds of core."""
    sizes = sorted({len(core) for core in cores}, reverse=True)
    groups = [tuple(core for core in cores if len(core) == size) for size in sizes]
    return max(groups, key=lambda group: sum(map(len, group)), default=())


def _count_threads(host: Host) -> int:
    """Threads per core of the nodes; if the cores of the host differ, each core is one CPU for Slurm.

    slurmd divides the CPUs of the machine by its cores, without a remainder: on a machine with SMT and one offline CPU it finds
    one thread per core, and the controller refuses a node with more (xcpuinfo.c of Slurm; not tested on such a machine).
    """
    counts = {len(CpuSet.parse(core["cpus"])) for core in host["cores"]}
    return counts.pop() if len(counts) == 1 else 1


def _count_memory(host: Host, numa: int, size: int) -> int:
    """MiB. Pages of other programs are included while these use them: the launch of a guest refuses what is missing."""
    uses = [page for page in host["pages"] if (page["node"], page["page_size"]) == (numa, size)]
    return sum(page["count"] for page in uses if page["use"] != "housekeeping") * size >> 20


def _list_vfs(host: Host, numa: int, *, is_first: bool) -> Iterator[PciAddress]:
    """By address, so that the order does not depend on that of the survey. A PF without a NUMA node belongs to the first."""
    uplinks = {uplink["name"] for uplink in host["uplinks"] if uplink["edge"] and uplink["edge"] not in _NO_VF_EDGES}
    for pf in sorted(host["survey"]["pfs"], key=lambda pf: PciAddress.parse(pf["address"])):
        if pf["interface"] in uplinks and not pf["fault"] and _is_on(pf["node"], numa, is_first=is_first):
            functions = sorted((vf["index"], vf["address"]) for vf in pf["vfs"] if not vf["use"])
            yield from (PciAddress.parse(address) for _, address in functions)


def _list_disks(host: Host, numa: int, *, is_first: bool) -> Iterator[PciAddress]:
    """A controller without a NUMA node belongs to the first."""
    for disk in host["disks"]:
        if disk["use"] not in _NOT_FOR_GUESTS and _is_on(disk["node"], numa, is_first=is_first):
            yield PciAddress.parse(disk["address"])


def _is_on(node: int | None, numa: int, *, is_first: bool) -> bool:
    return is_first if node is None else node == numa
