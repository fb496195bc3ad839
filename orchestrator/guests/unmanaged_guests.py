"""Finds running virtual machines that the manager did not create, and the CPUs that they run on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from errno import ENOENT, ESRCH
from uuid import UUID

from orchestrator.errors import HostError, HypervisorError, RequestError
from orchestrator.host.cgroups import read_cgroup, read_cpuset
from orchestrator.host.processes import find_comm, read_arguments, read_machine_owners, read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.hypervisor.unmanaged import Unmanaged
from orchestrator.model.host_view import UnmanagedGuest
from orchestrator.values import CpuSet

_DOMAIN, _PROGRAM = "domain", "program"


def list_unmanaged(
    host: HostRoot, hypervisor: Hypervisor, managed: frozenset[UUID], online: CpuSet
) -> tuple[tuple[UnmanagedGuest, ...], str]:
    """Domains of libvirt, and virtual machines of other programs; and why not all of them are known, empty if all are."""
    domains: tuple[Unmanaged, ...] = ()
    problems = []
    try:
        domains = tuple(domain for domain in hypervisor.list_running(managed)[1] if domain.running)
    except HypervisorError as error:
        problems.append(f"domains of libvirt: {error.message}")
    found = [guest for domain in domains if (guest := _describe(host, _DOMAIN, domain.name, domain.pid, online))]
    try:
        found += _list_programs(host, managed, domains, online)
    except HostError as error:
        problems.append(f"virtual machines of other programs: {error.message}")
    return tuple(found), "; ".join(problems)


def _list_programs(
    host: HostRoot, managed: frozenset[UUID], domains: Iterable[Unmanaged], online: CpuSet
) -> Iterator[UnmanagedGuest]:
    pids = {domain.pid for domain in domains}
    known = {str(uuid) for uuid in (*managed, *(domain.uuid for domain in domains))}
    for pid in read_machine_owners(host):
        try:
            if pid in pids or known.intersection(read_arguments(host, pid)):  # QEMU's argument -uuid
                continue
            if guest := _describe(host, _PROGRAM, find_comm(host, pid) or "", pid, online):
                yield guest
        except HostError as error:
            if error.errno not in (ENOENT, ESRCH):  # it has ended
                raise


def _describe(host: HostRoot, kind: str, name: str, pid: int | None, online: CpuSet) -> UnmanagedGuest | None:
    """None if its process has ended."""
    if pid is None:
        return UnmanagedGuest(kind, name, pid, CpuSet(), confined=False, why="libvirt does not report its process")
    try:
        threads = read_process_threads(host, pid)
        if not threads:
            return None
        cpuset = read_cpuset(host, read_cgroup(host, pid, pid))
    except (HostError, RequestError) as error:
        return UnmanagedGuest(kind, name, pid, CpuSet(), confined=False, why=f"its threads cannot be read: {error.message}")
    limit = online if cpuset is None else online & cpuset
    free = [thread for thread in threads if online <= thread.allowed & limit]
    cpus = {cpu for thread in threads if thread not in free for cpu in (thread.allowed & limit).ids}
    cpus.update(thread.last_cpu for thread in free)
    return UnmanagedGuest(kind, name, pid, CpuSet.of(cpus), confined=not free, why="")
