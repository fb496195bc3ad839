"""Isolated partitions: control groups that have CPUs alone, without load balancing.

A partition below groups that are none themselves is remote: each group above must have its CPUs in `cpuset.cpus.exclusive`
(Documentation/admin-guide/cgroup-v2.rst, section Cpuset).
"""

from __future__ import annotations

from errno import ENOENT

from orchestrator.errors import HostError
from orchestrator.host.cpus import parse_cpus
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

MACHINES = "machine.slice"
"""The group above those of guests (systemd.special(7)). It exists only while there are some."""
_ROOT = "sys/fs/cgroup"
_ISOLATED = "isolated"
_TOO_OLD = "use Linux 6.7 or later, or boot with isolcpus="


def exclusive_file(cgroup: str) -> str:
    return f"{_ROOT}/{cgroup.strip('/')}/cpuset.cpus.exclusive"


def read_exclusive(host: HostRoot, cgroup: str) -> CpuSet:
    """No CPUs if the group does not exist, or the kernel is too old."""
    file = exclusive_file(cgroup)
    return parse_cpus(file, host.find(file) or "")


def require_exclusive(host: HostRoot, cgroup: str) -> CpuSet:
    """As ``read_exclusive``. Raises HostError (ENOENT) if the group does not exist, or the kernel is too old."""
    file = exclusive_file(cgroup)
    text = host.find(file)
    if text is None:
        raise HostError(f"the kernel has no /{file}", _TOO_OLD, ENOENT)
    return parse_cpus(file, text)


def is_partition(host: HostRoot, cgroup: str) -> bool:
    return host.find(f"{_ROOT}/{cgroup.strip('/')}/cpuset.cpus.partition") == _ISOLATED


def list_parents(cgroup: str) -> tuple[str, ...]:
    """The groups above, from the top down, without the root."""
    parts = cgroup.strip("/").split("/")
    return tuple("/".join(parts[:count]) for count in range(1, len(parts)))


def add_exclusive(host: HostRoot, cgroup: str, cpus: CpuSet) -> None:
    """Raises HostError if the kernel is too old, or another group has one of the CPUs."""
    file, before = exclusive_file(cgroup), require_exclusive(host, cgroup)
    if cpus <= before:
        return
    host.write(file, str(before | cpus))
    actual = parse_cpus(file, host.read(file))
    if not cpus <= actual:
        raise HostError(
            f"/{file}: requested CPUs {before | cpus}, kernel set {actual}", "check which control group has the others"
        )


def make_partition(host: HostRoot, cgroup: str, cpus: CpuSet) -> None:
    """Isolates the CPUs for a group, whose parents have them exclusively. The partition ends with its group.

    Raises HostError with the kernel's reason if the partition is not valid; the group is then as before.
    """
    file = f"{_ROOT}/{cgroup.strip('/')}/cpuset.cpus.partition"
    if host.find(file) is None:
        raise HostError(f"the kernel has no /{file}", _TOO_OLD, ENOENT)
    add_exclusive(host, cgroup, cpus)
    host.write(file, _ISOLATED)
    if (actual := host.read(file)) != _ISOLATED:
        host.write(file, "member")
        what = f"control group /{cgroup.strip('/')}: requested an isolated partition of CPUs {cpus}, the kernel says {actual!r}"
        raise HostError(what, "check that no other control group has these CPUs in cpuset.cpus.exclusive")
