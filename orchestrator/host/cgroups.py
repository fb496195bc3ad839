"""Control groups of version 2 (kernel: Documentation/admin-guide/cgroup-v2.rst, Threads). Moves threads and
confines groups; makes none."""

from __future__ import annotations

from errno import EBUSY, ENOENT, EOPNOTSUPP, ESRCH

from orchestrator.errors import HostError
from orchestrator.host.cpus import parse_cpus
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

_ROOT = "sys/fs/cgroup"
_HINTS = {
    EBUSY: "the group has controllers enabled for its children, so it holds no threads of its own",
    ENOENT: "there is no such control group, or the host still mounts version 1 (systemd.unified_cgroup_hierarchy=1)",
    EOPNOTSUPP: "threads move only within one threaded subtree: process and group must be below the same domain group",
    ESRCH: "the thread has ended",
}


def read_cgroup(host: HostRoot, pid: int, tid: int) -> str:
    """The control group of a thread, as a path below the hierarchy's root: `/machine.slice/...`.

    Raises:
        HostError: no such thread (ENOENT), or the host has no version 2 hierarchy.
    """
    return _parse_cgroup(host.read(f"proc/{pid}/task/{tid}/cgroup"), tid)


def read_cpuset(host: HostRoot, cgroup: str) -> CpuSet | None:
    """The CPUs that a control group may use, by itself and all groups above it; None where no group above it limits CPUs.

    Raises:
        HostError: the file is there but cannot be read.
    """
    path = cgroup.strip("/")
    while path:
        # A group without the controller `cpuset` has no such file, and the limits of the group above it.
        name = f"{_ROOT}/{path}/cpuset.cpus.effective"
        if text := host.find(name):
            return parse_cpus(name, text)
        path = path.rpartition("/")[0]
    return None


def move_thread(host: HostRoot, tid: int, cgroup: str) -> None:
    """Moves one thread into a threaded control group, and reads back.

    Args:
        cgroup: path below the hierarchy's root, as `read_cgroup` gives it.

    Raises:
        HostError: no such group (ENOENT) or thread (ESRCH), or the group is in another threaded subtree (EOPNOTSUPP).
    """
    path = "/" + cgroup.strip("/")
    try:
        host.write(f"{_ROOT}{path.rstrip('/')}/cgroup.threads", str(tid))
    except HostError as error:
        what = f"cannot move thread {tid} to the control group {path}"
        raise HostError(what, _HINTS.get(error.errno, error.hint), error.errno) from None
    # /proc/TID works for every thread, though only leaders are listed (proc(5)).
    actual = _parse_cgroup(host.read(f"proc/{tid}/cgroup"), tid)
    if actual != path:
        what = f"thread {tid} was to be in the control group {path}, but is in {actual}"
        raise HostError(what, "something moved it back: systemd or libvirt?")


def confine(host: HostRoot, cgroup: str, cpus: CpuSet) -> None:
    """Confines a control group, and all below it, to CPUs, and reads back: no affinity that a thread sets reaches beyond.

    Args:
        cgroup: path below the hierarchy's root.

    Raises:
        HostError: no such group (ENOENT), or the group above it does not have all of the CPUs, with both sets.
    """
    path = "/" + cgroup.strip("/")
    try:
        host.write(f"{_ROOT}{path}/cpuset.cpus", str(cpus))
    except HostError as error:
        what = f"cannot confine the control group {path} to CPUs {cpus}"
        raise HostError(what, _HINTS.get(error.errno, error.hint), error.errno) from None
    name = f"{_ROOT}{path}/cpuset.cpus.effective"
    actual = parse_cpus(name, host.read(name))
    if actual != cpus:
        what = f"the control group {path} was to be confined to CPUs {cpus}, but has {actual}"
        raise HostError(what, "a group above it has fewer: `systemctl show --property AllowedCPUs machine.slice`")


def _parse_cgroup(text: str, tid: int) -> str:
    for line in text.splitlines():
        # cgroups(7): the version 2 hierarchy always has number 0 and no controller names.
        if line.startswith("0::"):
            return line.removeprefix("0::")
    raise HostError(f"thread {tid} is in no control group of version 2", _HINTS[ENOENT])
