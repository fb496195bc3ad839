"""Online, isolated and sibling CPUs, and thread affinities (Documentation/admin-guide/cputopology.rst, sched_setaffinity(2))."""

from __future__ import annotations

from errno import EINVAL, EPERM, ESRCH

from orchestrator.errors import HostError, RequestError
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import Core
from orchestrator.values import CpuSet

_CPUS = "sys/devices/system/cpu"
ONLINE = f"{_CPUS}/online"
_NODES = "sys/devices/system/node"
# X86_FEATURE_TOPOEXT, 6*32+22 (arch/x86/include/asm/cpufeatures.h)
_TOPOEXT = "00D6"
_AFFINITY_HINTS = {
    EINVAL: "no requested CPU is online and in the thread's cpuset, or the thread is not movable (PF_NO_SETAFFINITY)",
    EPERM: "run as root",
    ESRCH: "the thread has exited",
}


def read_online(host: HostRoot) -> CpuSet:
    return parse_cpus(ONLINE, host.read(ONLINE))


def read_isolated(host: HostRoot) -> CpuSet:
    """CPUs excluded from load balancing, by `isolcpus=domain` or by isolated cpuset partitions."""
    # Before Linux 6.19 the first file shows only the boot parameter.
    files = (f"{_CPUS}/isolated", "sys/fs/cgroup/cpuset.cpus.isolated")
    return CpuSet.of(cpu for file in files for cpu in parse_cpus(file, host.find(file) or "").ids)


def read_possible(host: HostRoot) -> CpuSet:
    """CPUs that can be online on this host, including CPUs not plugged in; empty if the kernel does not report them."""
    return parse_cpus(f"{_CPUS}/possible", host.find(f"{_CPUS}/possible") or "")


def read_present(host: HostRoot) -> CpuSet:
    """CPUs that are plugged in, online or not; empty if the kernel does not report them."""
    return parse_cpus(f"{_CPUS}/present", host.find(f"{_CPUS}/present") or "")


def parse_cpus(name: str, text: str) -> CpuSet:
    """Raises HostError with the file's name, not RequestError: the caller's request is not at fault."""
    try:
        return CpuSet.parse(text)
    except RequestError as error:
        raise HostError(f"cannot parse /{name}: {error.message}") from None


def survey_cores(host: HostRoot) -> tuple[tuple[Core, ...], tuple[HostError, ...]]:
    """The online physical cores in CPU order, and the errors of CPUs that cannot be read: a CPU is going online or offline, or
    firmware and kernel disagree.
    """
    online = read_online(host)
    cores: list[Core] = []
    problems: list[HostError] = []
    seen: set[int] = set()
    for cpu in online:
        if cpu in seen:
            continue
        try:
            core = _read_core(host, cpu, online)
        except HostError as error:
            problems.append(error)
            continue
        cores.append(core)
        seen |= core.cpus.ids
    return tuple(cores), tuple(problems)


def _read_core(host: HostRoot, cpu: int, online: CpuSet) -> Core:
    folder = f"{_CPUS}/cpu{cpu}/topology"
    listed, socket = host.read(f"{folder}/core_cpus_list"), host.read(f"{folder}/physical_package_id")
    try:
        # A CPU without SMT lists itself. Offline siblings are not listed, and guests must not get them.
        core = Core(CpuSet.parse(listed) & online, int(socket), _read_node(host, cpu))
    except (RequestError, ValueError) as error:
        raise HostError(f"cannot parse /{folder}: {error}") from None
    if cpu not in core.cpus:
        raise HostError(f"/{folder}/core_cpus_list is {listed!r}: CPU {cpu} itself is missing")
    return core


def read_kvm(host: HostRoot) -> bool:
    # KVM registers the device only if processor and firmware support it (virt/kvm/kvm_main.c, kvm_init). The manager's sandbox
    # has a private /dev.
    return host.exists("sys/class/misc/kvm")


def shows_devices(host: HostRoot) -> bool:
    """Whether /sys shows the devices of the class of KVM's: without it, a missing KVM means nothing."""
    return host.exists("sys/class/misc")


def read_cmdline(host: HostRoot) -> str:
    """Empty if it cannot be read."""
    try:
        return check_cmdline(host)
    except HostError:
        return ""


def check_cmdline(host: HostRoot) -> str:
    """As ``read_cmdline``, but raises HostError: for an answer that depends on what is not in it."""
    return host.read("proc/cmdline")


def read_topoext(host: HostRoot) -> bool:
    """AMD's topology extensions (CPUID 8000_001E); False for other vendors."""
    # From modalias (arch/x86/kernel/cpu/match.c): before Linux 5.18, reading /proc/cpuinfo interrupts every CPU.
    _, _, features = (host.find(f"{_CPUS}/modalias") or "").partition(":feature:")
    return _TOPOEXT in features.split(",")


def _read_node(host: HostRoot, cpu: int) -> int:
    # A link `nodeN` in the CPU's folder. A kernel without NUMA has no such links, and before Linux 2.6.33 none has.
    nodes = [name[4:] for name in host.names(f"{_CPUS}/cpu{cpu}") if name.startswith("node") and name[4:].isdecimal()]
    if nodes or not host.exists(_NODES):
        return int(nodes[0]) if nodes else 0
    known = [name[4:] for name in host.names(_NODES) if name.startswith("node") and name[4:].isdecimal()]
    lists = {int(node): f"{_NODES}/node{node}/cpulist" for node in known}
    return next((node for node, name in lists.items() if cpu in parse_cpus(name, host.find(name) or "")), 0)


def read_affinity(host: HostRoot, tid: int) -> CpuSet:
    """Limited to the thread's cpuset. Raises HostError (ESRCH) if the thread does not exist."""
    try:
        return host.sched_getaffinity(tid)
    except HostError as error:
        raise _affinity_error(f"cannot read the affinity of thread {tid}", error) from None


def set_affinity(host: HostRoot, tid: int, cpus: CpuSet) -> None:
    """Raises HostError if the thread does not exist (ESRCH), is not movable or no CPU is usable (EINVAL), or the kernel ignored
    CPUs that are offline or not in the thread's cpuset.
    """
    try:
        host.sched_setaffinity(tid, cpus)
    except HostError as error:
        raise _affinity_error(f"cannot confine thread {tid} to CPUs {cpus}", error) from None
    actual = read_affinity(host, tid)
    if actual != cpus:
        raise HostError(
            f"thread {tid}: requested CPUs {cpus}, kernel set {actual}",
            f"check that the CPUs are online and in the cpuset of /proc/{tid}/cpuset",
        )


def _affinity_error(what: str, error: HostError) -> HostError:
    return HostError(what, _AFFINITY_HINTS.get(error.errno, ""), error.errno)
