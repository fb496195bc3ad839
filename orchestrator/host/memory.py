"""Swap, transparent huge pages and mounts of huge pages."""

from __future__ import annotations

from orchestrator.host.root import HostRoot


def read_swaps(host: HostRoot) -> tuple[str, ...]:
    """Names of all active swap areas (proc(5), /proc/swaps)."""
    return tuple(line.split()[0] for line in host.read("proc/swaps").splitlines()[1:] if line.strip())


def read_hugetlb_mounts(host: HostRoot) -> tuple[str, ...]:
    """Folders on which hugetlbfs is mounted."""
    fields = [line.split() for line in host.read("proc/mounts").splitlines()]
    return tuple(words[1] for words in fields if len(words) > 2 and words[2] == "hugetlbfs")


def has_settings(host: HostRoot) -> bool:
    """The kernel shows its settings of memory, among them those of KSM and transparent huge pages if it has these."""
    return host.exists("sys/kernel/mm")


def read_transparent(host: HostRoot) -> str:
    """The chosen mode of transparent huge pages; empty without them (Documentation/admin-guide/mm/transhuge.rst)."""
    text = host.find("sys/kernel/mm/transparent_hugepage/enabled") or ""
    return text.partition("[")[2].partition("]")[0]
