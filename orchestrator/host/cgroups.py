"""Control groups, version 2 (Documentation/admin-guide/cgroup-v2.rst). Paths of groups are relative to the root of the hierarchy:
`/machine.slice/...`. Moves threads and confines groups, but does not create groups."""

from __future__ import annotations

from errno import EBUSY, ENOENT, EOPNOTSUPP, ESRCH

from orchestrator.errors import HostError
from orchestrator.host.cpus import parse_cpus
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

_ROOT = "sys/fs/cgroup"
_HINTS = {
    EBUSY: "the control group has controllers enabled for its children and cannot contain threads",
    ENOENT: "the control group does not exist, or the host mounts cgroup version 1 (systemd.unified_cgroup_hierarchy=1)",
    EOPNOTSUPP: "a thread can move only within one threaded subtree, below the same domain group",
    ESRCH: "the thread has exited",
}


def read_controllers(host: HostRoot) -> tuple[str, ...] | None:
    """The controllers of the version 2 hierarchy; None if it is not mounted on /sys/fs/cgroup."""
    text = host.find(f"{_ROOT}/cgroup.controllers")
    return None if text is None else tuple(text.split())


def is_version_1(host: HostRoot) -> bool | None:
    """Whether a hierarchy of version 1 is mounted; None if no hierarchy is, as in some containers."""
    kinds = {words[2] for line in host.read("proc/mounts").splitlines() if len(words := line.split()) > 2}
    return "cgroup" in kinds if kinds & {"cgroup", "cgroup2"} else None


def read_cgroup(host: HostRoot, pid: int, tid: int) -> str:
    """Raises HostError if the thread does not exist (ENOENT) or the host has no version 2 hierarchy."""
    return _parse_cgroup(host.read(f"proc/{pid}/task/{tid}/cgroup"), tid)


def read_cpuset(host: HostRoot, cgroup: str) -> CpuSet | None:
    """The CPUs that a control group may use, limited by all parent groups; None if neither it nor a parent limits CPUs."""
    path = cgroup.strip("/")
    while path:
        # A group without the controller `cpuset` does not have this file, and has the limits of its parent.
        name = f"{_ROOT}/{path}/cpuset.cpus.effective"
        if text := host.find(name):
            return parse_cpus(name, text)
        path = path.rpartition("/")[0]
    return None


def move_thread(host: HostRoot, tid: int, cgroup: str) -> None:
    """Raises HostError (EOPNOTSUPP) if the group is in another threaded subtree."""
    path = "/" + cgroup.strip("/")
    try:
        host.write(f"{_ROOT}{path.rstrip('/')}/cgroup.threads", str(tid))
    except HostError as error:
        what = f"cannot move thread {tid} to control group {path}"
        raise HostError(what, _HINTS.get(error.errno, error.hint), error.errno) from None
    # /proc/TID exists for every thread, but only leaders are listed (proc(5)).
    actual = _parse_cgroup(host.read(f"proc/{tid}/cgroup"), tid)
    if actual != path:
        what = f"thread {tid}: requested control group {path}, but it is in {actual}"
        raise HostError(what, "check whether systemd or libvirt moved it")


def confine(host: HostRoot, cgroup: str, cpus: CpuSet) -> None:
    """Limits a control group and all its children to CPUs, whatever affinities their threads set."""
    path = "/" + cgroup.strip("/")
    try:
        host.write(f"{_ROOT}{path}/cpuset.cpus", str(cpus))
    except HostError as error:
        what = f"cannot confine control group {path} to CPUs {cpus}"
        raise HostError(what, _HINTS.get(error.errno, error.hint), error.errno) from None
    name = f"{_ROOT}{path}/cpuset.cpus.effective"
    actual = parse_cpus(name, host.read(name))
    if actual != cpus:
        what = f"control group {path}: requested CPUs {cpus}, kernel set {actual}"
        hint = "a parent group allows fewer CPUs: check `systemctl show --property AllowedCPUs machine.slice`"
        raise HostError(what, hint)


def _parse_cgroup(text: str, tid: int) -> str:
    for line in text.splitlines():
        # cgroups(7): version 2 always has hierarchy number 0 and no controller names.
        if line.startswith("0::"):
            return line.removeprefix("0::")
    raise HostError(f"thread {tid} is not in a control group of version 2", _HINTS[ENOENT])
