"""CPUs of the host: which are online, which share a core, which are kept out of load balancing, and where a thread may run.

Sources: Documentation/admin-guide/cputopology.rst, Documentation/admin-guide/cgroup-v2.rst, sched_setaffinity(2).
"""

from __future__ import annotations

from errno import EINVAL, EPERM, ESRCH

from orchestrator.errors import HostError, RequestError
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import Core
from orchestrator.values import CpuSet

_CPUS = "sys/devices/system/cpu"
ONLINE = f"{_CPUS}/online"
# X86_FEATURE_TOPOEXT, 6*32+22 (arch/x86/include/asm/cpufeatures.h): word 6 is a register of the CPU, bit by bit.
_TOPOEXT = "00D6"
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
    return parse_cpus(ONLINE, host.read(ONLINE))


def read_isolated(host: HostRoot) -> CpuSet:
    """The CPUs that the kernel keeps out of load balancing: by `isolcpus=domain` at boot, or by isolated cpuset partitions.

    Two files, because before Linux 6.19 the first tells only what was said at boot.

    Raises:
        HostError: a file is there but cannot be read.
    """
    files = (f"{_CPUS}/isolated", "sys/fs/cgroup/cpuset.cpus.isolated")
    return CpuSet.of(cpu for file in files for cpu in parse_cpus(file, host.find(file) or "").ids)


def read_possible(host: HostRoot) -> CpuSet:
    """The CPUs that can ever be online on this host, those that are offline or not plugged in too; none if that is not told."""
    return parse_cpus(f"{_CPUS}/possible", host.find(f"{_CPUS}/possible") or "")


def parse_cpus(name: str, text: str) -> CpuSet:
    """A list of CPUs from a file of the kernel. What is wrong with it is no fault of whoever asks.

    Raises:
        HostError: the text is no list of CPUs, with the file's name.
    """
    try:
        return CpuSet.parse(text)
    except RequestError as error:
        raise HostError(f"/{name} is not understood: {error.message}") from None


def survey_cores(host: HostRoot) -> tuple[tuple[Core, ...], tuple[HostError, ...]]:
    """The physical cores that are online, each with its SMT siblings, in CPU order; and the errors of CPUs that cannot be read.

    A CPU whose topology cannot be read (it is just going on or off line, or firmware and kernel disagree) is part of no core.

    Raises:
        HostError: sysfs is not there.
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
        # A CPU without SMT lists itself; siblings that are offline are not listed, and may not be handed out.
        core = Core(CpuSet.parse(listed) & online, int(socket), _read_node(host, cpu))
    except (RequestError, ValueError) as error:
        raise HostError(f"/{folder} is not understood: {error}") from None
    if cpu not in core.cpus:
        raise HostError(f"/{folder}/core_cpus_list is {listed!r}, without CPU {cpu} itself")
    return core


def read_kvm(host: HostRoot) -> bool:
    """Whether the kernel offers /dev/kvm: KVM registers the device only where the processor and the firmware let it
    (virt/kvm/kvm_main.c, kvm_init). From sysfs: the manager's sandbox has a /dev of its own.
    """
    return host.exists("sys/class/misc/kvm")


def read_cmdline(host: HostRoot) -> str:
    """The kernel's command line, empty where it cannot be read (proc_cmdline(5))."""
    try:
        return host.read("proc/cmdline")
    except HostError:
        return ""


def read_topoext(host: HostRoot) -> bool:
    """Whether the CPUs have AMD's topology extensions (CPUID 8000_001E), which tell of SMT threads; CPUs of others never do.

    From modalias (arch/x86/kernel/cpu/match.c): to read /proc/cpuinfo interrupts every CPU before Linux 5.18, guests' too.

    Raises:
        HostError: the file is there but cannot be read.
    """
    _, _, features = (host.find(f"{_CPUS}/modalias") or "").partition(":feature:")
    return _TOPOEXT in features.split(",")


def _read_node(host: HostRoot, cpu: int) -> int:
    """A CPU's NUMA node, a link `nodeN` in the CPU's folder; 0 for a kernel without NUMA, which has no such links."""
    nodes = [name[4:] for name in host.names(f"{_CPUS}/cpu{cpu}") if name.startswith("node") and name[4:].isdecimal()]
    return int(nodes[0]) if nodes else 0


def read_affinity(host: HostRoot, tid: int) -> CpuSet:
    """The CPUs that a thread may run on (sched_getaffinity(2): already limited to its cpuset).

    Raises:
        HostError: there is no such thread (ESRCH).
    """
    try:
        return host.sched_getaffinity(tid)
    except HostError as error:
        raise _affinity_error(f"cannot read the affinity of thread {tid}", error) from None


def set_affinity(host: HostRoot, tid: int, cpus: CpuSet) -> None:
    """Confines a thread to CPUs, and reads back: the kernel silently leaves out CPUs that are offline or not in its cpuset.

    Raises:
        HostError: no such thread (ESRCH), not to be moved or no usable CPU (EINVAL), not root (EPERM), or only a part of the CPUs
            was taken, with both sets.
    """
    try:
        host.sched_setaffinity(tid, cpus)
    except HostError as error:
        raise _affinity_error(f"cannot confine thread {tid} to CPUs {cpus}", error) from None
    actual = read_affinity(host, tid)
    if actual != cpus:
        raise HostError(
            f"thread {tid} was to be confined to CPUs {cpus}, but may run on {actual}",
            "its cpuset (/proc/TID/cpuset) does not hold all of them, or some are offline",
        )


def _affinity_error(what: str, error: HostError) -> HostError:
    return HostError(what, _AFFINITY_HINTS.get(error.errno, ""), error.errno)
