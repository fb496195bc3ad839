"""Swap, transparent huge pages, mounts of huge pages, nodes with memory, and errors of memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.host.cpus import parse_cpus
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet, Size

# The second on kernels before 3.9.
_HAS_MEMORY = ("has_memory", "has_normal_memory")


def read_swaps(host: HostRoot) -> tuple[str, ...]:
    """Names of all active swap areas (proc(5), /proc/swaps)."""
    return tuple(line.split()[0] for line in host.read("proc/swaps").splitlines()[1:] if line.strip())


@dataclass(frozen=True)
class HugetlbMount:
    folder: str
    page_size: Size | None  # None for the default size of a kernel that does not tell it


def read_hugetlb_mounts(host: HostRoot) -> tuple[HugetlbMount, ...]:
    """Folders on which hugetlbfs is mounted. A mount has pages of one size (fs/hugetlbfs/inode.c, hugetlbfs_show_options())."""
    fields = [line.split() for line in host.read("proc/mounts").splitlines()]
    return tuple(
        HugetlbMount(words[1], _find_page_size(host, words[3])) for words in fields if len(words) > 3 and words[2] == "hugetlbfs"
    )


def _find_page_size(host: HostRoot, options: str) -> Size | None:
    text = next((word.partition("=")[2] for word in options.split(",") if word.startswith("pagesize=")), "")
    if not text:
        match = re.search(r"^Hugepagesize:\s*(\d+) kB", host.find("proc/meminfo") or "", re.MULTILINE | re.ASCII)
        return Size(int(match[1]) << 10) if match else None
    match = re.fullmatch(r"(\d+)([KMG]?)", text, re.ASCII)
    return Size(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]) if match else None


def read_memory_nodes(host: HostRoot) -> CpuSet | None:
    """Numbers of the NUMA nodes that have memory; None on a kernel without NUMA, and if it does not tell."""
    text = next((text for name in _HAS_MEMORY if (text := host.find(f"sys/devices/system/node/{name}")) is not None), None)
    return None if text is None else parse_cpus("sys/devices/system/node/has_memory", text)


@dataclass(frozen=True)
class MemoryErrors:
    """Of one memory controller since it was initialised (Documentation/driver-api/edac.rst)."""

    controller: str
    corrected: int
    uncorrected: int


def read_memory_errors(host: HostRoot) -> tuple[MemoryErrors, ...]:
    """Empty if no driver of a memory controller is loaded: without ECC none is."""
    folder = "sys/devices/system/edac/mc"
    names = [name for name in (host.names(folder) if host.exists(folder) else ()) if re.fullmatch(r"mc\d+", name, re.ASCII)]
    return tuple(
        MemoryErrors(name, int(host.read(f"{folder}/{name}/ce_count")), int(host.read(f"{folder}/{name}/ue_count")))
        for name in names
    )


def has_settings(host: HostRoot) -> bool:
    """The kernel shows its settings of memory, among them those of KSM and transparent huge pages if it has these."""
    return host.exists("sys/kernel/mm")


def read_transparent(host: HostRoot) -> str:
    """The chosen mode of transparent huge pages; empty without them (Documentation/admin-guide/mm/transhuge.rst)."""
    text = host.find("sys/kernel/mm/transparent_hugepage/enabled") or ""
    return text.partition("[")[2].partition("]")[0]
