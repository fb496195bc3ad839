"""Adds the resources of unmanaged libvirt domains to the planner's input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from orchestrator.errors import HostError, RequestError
from orchestrator.host.cgroups import read_cgroup, read_cpuset
from orchestrator.host.ports import find_device
from orchestrator.host.processes import read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.unmanaged import Unmanaged
from orchestrator.model.plan import Allocated
from orchestrator.model.topology import Topology
from orchestrator.values import CpuSet, PciAddress


def add_unmanaged(
    host: HostRoot, allocated: Allocated, domains: Iterable[Unmanaged], topology: Topology, housekeeping: CpuSet, *, named: bool
) -> tuple[Allocated, tuple[str, ...]]:
    """Returns the allocated resources with those of unmanaged domains, and one sentence per domain that could not be read.

    Guests never get CPUs to which libvirt, the kernel or a control group pins a running domain. They get last the CPUs and VFs of
    a domain that is shut off, and CPUs of the nodes that its memory is bound to. An unpinned domain claims no core: the audit
    names it.

    Args:
        housekeeping: CPUs that guests never get; pinning to them does not matter.
        named: reasons may name the domains, which tenants may not see.
    """
    pinned: dict[int, str] = {}
    last_cpus: dict[int, str] = {}
    last_vfs: dict[PciAddress, str] = {}
    vfs: set[PciAddress] = set()
    problems: list[str] = []
    for domain in domains:
        owner = str(domain) if named else "an unmanaged domain"
        sets = [*domain.pins]
        unread = [domain.problem] if domain.problem else []
        if domain.running:
            vfs |= domain.hostdevs
            try:
                sets += _read_allowed(host, domain.pid)
            except (HostError, RequestError) as error:
                unread.append(f"its threads cannot be read: {error.message}")
        else:
            last_vfs |= dict.fromkeys(domain.hostdevs, f"is a device of {owner}")
            # For a running domain the kernel reports the use of an interface (`host.ports.describe_use`).
            last_vfs |= dict.fromkeys(_find_functions(host, domain.interfaces), f"has an interface of {owner}")
        cpus = {cpu for pins in sets if not topology.cpus <= pins for cpu in pins.ids - housekeeping.ids}
        (pinned if domain.running else last_cpus).update(dict.fromkeys(cpus, f"are pinned by {owner}"))
        if not cpus:
            near = {cpu for core in topology.cores if core.node in domain.nodes for cpu in core.cpus.ids}
            last_cpus |= dict.fromkeys(near, f"are on the NUMA node to which {owner} is bound")
        if unread:
            problems.append(f"{domain}: {'; '.join(unread)}; its other resources are unknown")
    unpinned = {cpu: reason for cpu, reason in last_cpus.items() if cpu not in pinned}
    allocated = replace(allocated, vfs=allocated.vfs | vfs, pinned=pinned, last_cpus=unpinned, last_vfs=last_vfs)
    return allocated, tuple(problems)


def _find_functions(host: HostRoot, interfaces: Iterable[str]) -> Iterator[PciAddress]:
    """The PCI functions of those interfaces that have one."""
    for name in interfaces:
        try:
            if device := find_device(host, name):
                yield PciAddress.parse(device)
        except (HostError, RequestError):
            continue  # not a PCI function: a bond, a USB device


def _read_allowed(host: HostRoot, pid: int | None) -> list[CpuSet]:
    """The CPUs of each QEMU thread according to the kernel. Raises HostError if they cannot be read."""
    if pid is None:
        raise HostError("libvirt does not report its process")
    threads = read_process_threads(host, pid)
    cpuset = read_cpuset(host, read_cgroup(host, pid, pid)) if threads else None
    allowed = {thread.allowed if cpuset is None else thread.allowed & cpuset for thread in threads}
    return [cpus for cpus in allowed if cpus]
