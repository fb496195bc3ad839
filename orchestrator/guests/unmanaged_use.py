"""What libvirt domains that the manager did not create use, as libvirt and the kernel tell it, for the planner."""

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
    host: HostRoot, claims: Allocated, domains: Iterable[Unmanaged], topology: Topology, housekeeping: CpuSet, *, named: bool
) -> tuple[Allocated, tuple[str, ...]]:
    """The claims with what unmanaged domains use, and what of some domains could not be read, a sentence each.

    What a domain that runs is pinned to, by libvirt in whatever way, by the kernel or by its control group, no guest gets. What
    one that is shut off would use, and CPUs of the nodes that its memory is bound to, guests get last. A domain that may run
    anywhere claims no core: the audit names it.

    Args:
        housekeeping: CPUs that are no guest's anyway: a domain that is pinned there alone is pinned to none of theirs.
        named: whether the reasons may name the domains: a tenant may not see them.
    """
    pinned: dict[int, str] = {}
    last_cpus: dict[int, str] = {}
    last_vfs: dict[PciAddress, str] = {}
    vfs: set[PciAddress] = set()
    problems: list[str] = []
    for domain in domains:
        who = str(domain) if named else "an unmanaged domain"
        sets = [*domain.pins]
        found = [domain.problem] if domain.problem else []
        if domain.running:
            vfs |= domain.hostdevs
            try:
                sets += _read_allowed(host, domain.pid)
            except (HostError, RequestError) as error:
                found.append(f"its threads cannot be read: {error.message}")
        else:
            last_vfs |= dict.fromkeys(domain.hostdevs, f"is a device of {who}")
            # Of one that runs the kernel itself shows what stands on an interface (`host.ports.describe_use`).
            last_vfs |= dict.fromkeys(_find_functions(host, domain.interfaces), f"has an interface of {who}")
        cpus = {cpu for pins in sets if not topology.cpus <= pins for cpu in pins.ids - housekeeping.ids}
        (pinned if domain.running else last_cpus).update(dict.fromkeys(cpus, f"are pinned by {who}"))
        if not cpus:
            near = {cpu for core in topology.cores if core.node in domain.nodes for cpu in core.cpus.ids}
            last_cpus |= dict.fromkeys(near, f"are of the NUMA node that {who} is bound to")
        if found:
            problems.append(f"{domain}: {'; '.join(found)}; what else it uses of the host is not known")
    known = {cpu: reason for cpu, reason in last_cpus.items() if cpu not in pinned}
    claims = replace(claims, vfs=claims.vfs | vfs, pinned=pinned, last_cpus=known, last_vfs=last_vfs)
    return claims, tuple(problems)


def _find_functions(host: HostRoot, interfaces: Iterable[str]) -> Iterator[PciAddress]:
    """The PCI functions that interfaces belong to, where there are some."""
    for name in interfaces:
        try:
            if device := find_device(host, name):
                yield PciAddress.parse(device)
        except (HostError, RequestError):
            continue  # it belongs to no PCI function: a bond, a USB device


def _read_allowed(host: HostRoot, pid: int | None) -> list[CpuSet]:
    """Where the threads of a domain's QEMU may run, as the kernel tells.

    Raises:
        HostError: that cannot be read.
    """
    if pid is None:
        raise HostError("libvirt does not tell its process")
    threads = read_process_threads(host, pid)
    cpuset = read_cpuset(host, read_cgroup(host, pid, pid)) if threads else None
    allowed = {thread.allowed if cpuset is None else thread.allowed & cpuset for thread in threads}
    return [cpus for cpus in allowed if cpus]
