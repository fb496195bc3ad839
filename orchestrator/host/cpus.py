"""CPUs of the host: which are online, which share a core, which are kept out of load balancing, and where a thread may run.

Sources: Documentation/admin-guide/cputopology.rst, Documentation/admin-guide/cgroup-v2.rst, sched_setaffinity(2).
"""

from __future__ import annotations

import os
from errno import EINVAL, EPERM, ESRCH

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.topology import Core
from orchestrator.values import CpuSet

_CPUS = "sys/devices/system/cpu"
_AFFINITY_HINTS = {
    EINVAL: "either none of the CPUs is online and in the thread's cpuset, or the kernel forbids to move it (PF_NO_SETAFFINITY)",
    EPERM: "run as root",
    ESRCH: "the thread has ended",
}


def read_online(host: HostRoot) -> CpuSet:
    """The CPUs that are online.

    Raises:
        HostError: sysfs is not there.
    """
    return CpuSet.parse(host.read(f"{_CPUS}/online"))


def read_isolated(host: HostRoot) -> CpuSet:
    """The CPUs that the kernel keeps out of load balancing: by `isolcpus=domain` at boot, or by isolated cpuset partitions.

    Two files, because before Linux 6.19 the first tells only what was said at boot.

    Raises:
        HostError: a file is there but cannot be read.
    """
    files = (f"{_CPUS}/isolated", "sys/fs/cgroup/cpuset.cpus.isolated")
    return CpuSet.of(cpu for file in files for cpu in CpuSet.parse(host.find(file) or ""))


def read_cores(host: HostRoot) -> tuple[Core, ...]:
    """The physical cores that are online, each with its SMT siblings, in CPU order.

    Raises:
        HostError: a CPU that is online has no topology in sysfs.
    """
    online = read_online(host)
    cores: list[Core] = []
    seen = CpuSet()
    for cpu in online:
        if cpu in seen:
            continue
        # A CPU without SMT lists itself; siblings that are offline are not listed, and may not be handed out.
        siblings = CpuSet.parse(host.read(f"{_CPUS}/cpu{cpu}/topology/core_cpus_list")) & online
        socket = int(host.read(f"{_CPUS}/cpu{cpu}/topology/physical_package_id"))
        cores.append(Core(siblings, socket, _read_node(host, cpu)))
        seen |= siblings
    return tuple(cores)


def _read_node(host: HostRoot, cpu: int) -> int:
    """A CPU's NUMA node, a link `nodeN` in the CPU's folder; 0 for a kernel without NUMA, which has no such links."""
    nodes = [name[4:] for name in host.names(f"{_CPUS}/cpu{cpu}") if name.startswith("node") and name[4:].isdecimal()]
    return int(nodes[0]) if nodes else 0


def read_affinity(tid: int) -> CpuSet:
    """The CPUs that a thread may run on (sched_getaffinity(2): already limited to its cpuset).

    Raises:
        HostError: there is no such thread (ESRCH).
    """
    try:
        return CpuSet.of(os.sched_getaffinity(tid))
    except OSError as error:
        raise _affinity_error(f"cannot read the affinity of thread {tid}", error) from None


def set_affinity(tid: int, cpus: CpuSet) -> None:
    """Confines a thread to CPUs, and reads back: the kernel silently leaves out CPUs that are offline or not in its cpuset.

    Raises:
        HostError: no such thread (ESRCH), not to be moved or no usable CPU (EINVAL), not root (EPERM), or only a part of the CPUs
            was taken, with both sets.
    """
    try:
        os.sched_setaffinity(tid, cpus)
    except OSError as error:
        raise _affinity_error(f"cannot confine thread {tid} to CPUs {cpus}", error) from None
    actual = read_affinity(tid)
    if actual != cpus:
        raise HostError(
            f"thread {tid} was to be confined to CPUs {cpus}, but may run on {actual}",
            "its cpuset (/proc/TID/cpuset) does not hold all of them, or some are offline",
        )


def _affinity_error(what: str, error: OSError) -> HostError:
    return HostError(what, _AFFINITY_HINTS.get(error.errno or 0, ""), error.errno or 0)
