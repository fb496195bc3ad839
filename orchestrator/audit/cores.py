"""core-exclusive, core-smt and manager-core: who may run, and who ran, on which CPU. Pure: takes values that were read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from orchestrator.host.irqs import Irq
from orchestrator.host.processes import Thread
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import WEAKER, Proof, count_faults, not_measured
from orchestrator.model.topology import Topology
from orchestrator.values import CpuSet

CORE_EXCLUSIVE, CORE_SMT, MANAGER_CORE = "core-exclusive", "core-smt", "manager-core"
FOREIGN, SHARED, STRAY = "threads that are not the core's own", "cores shared", "threads outside housekeeping"

# QEMU's helper threads, and KVM's that run in QEMU's process, may be born on a guest core; the manager moves them while it starts
# the guest, and gives a guest at most this many seconds for its first instruction (lifecycle).
_SET_UP = 60.0
_NAMED = 5


def read_guest_cpus(guest: RunningGuest, topology: Topology) -> CpuSet:
    """The CPUs that are the guest's: those its vCPUs are pinned to one by one, and all their SMT siblings."""
    pinned = CpuSet.of(cpu for vcpu in guest.vcpus if len(vcpu.pin) == 1 for cpu in vcpu.pin)
    return topology.siblings(pinned)


def find_suspects(guests: Iterable[RunningGuest], threads: Iterable[Thread], topology: Topology) -> tuple[Thread, ...]:
    """Threads that last ran on a guest core though they may not run there now: *when* they ran decides."""
    cores = CpuSet.of(cpu for guest in guests for cpu in read_guest_cpus(guest, topology))
    return tuple(
        thread for thread in threads if thread.last_cpu in cores and (not thread.allowed.meets(cores) or _is_rescuer(thread))
    )


def prove_core_exclusive(
    guest: RunningGuest,
    threads: tuple[Thread, ...],
    topology: Topology,
    last_runs: Mapping[int, float | None],
    irqs: tuple[Irq, ...] = (),
) -> Proof:
    """On the guest's cores nothing runs but its vCPUs, each on its own CPU.

    Args:
        threads: every thread of the host.
        last_runs: thread id → latest second after boot at which it can have run, for what ``find_suspects`` named.
        irqs: every interrupt of the host. One that may be sent to the guest's cores limits what is proved.
    """
    cores = read_guest_cpus(guest, topology)
    vcpus = {vcpu.tid for vcpu in guest.vcpus}
    found = {thread.tid: thread for thread in threads}
    if not vcpus or not vcpus <= found.keys():
        return not_measured(CORE_EXCLUSIVE, guest.name, FOREIGN, "the guest's vCPU threads ended while they were looked at")
    faults = _check_vcpus(guest, found)
    since = min(found[tid].started for tid in vcpus)
    notes: defaultdict[str, list[str]] = defaultdict(list)
    for thread in threads:
        if thread.tid in vcpus:
            continue
        fault = _check_foreign(thread, guest, cores, since, last_runs.get(thread.tid), notes)
        if fault:
            faults.append(fault)
    pins = ", ".join(f"vCPU {vcpu.index} → {vcpu.pin}" for vcpu in guest.vcpus)
    evidence = [
        f"CPUs {cores}: {len(threads)} threads of {len({thread.pid for thread in threads})} processes read from "
        "/proc/*/task/*/{stat,status}, kernel threads included",
        f"pinned ({guest.name}, pid {guest.pid}): {pins}",
    ]
    evidence += [f"{why}: {_tally(names)}" for why, names in notes.items()]
    evidence += _describe_irqs(irqs, cores)
    return count_faults(CORE_EXCLUSIVE, guest.name, FOREIGN, faults, evidence)


def prove_core_smt(
    guest: RunningGuest, guests: tuple[RunningGuest, ...], threads: tuple[Thread, ...], topology: Topology, housekeeping: CpuSet
) -> Proof:
    """No SMT sibling of a guest core belongs to another guest or to housekeeping.

    Args:
        guests: all guests of the host.
        threads: every thread of the host; where threads of the other guests may run decides, not what libvirt says of them.
    """
    faults = []
    own = read_guest_cpus(guest, topology)
    cores = [core for core in topology.cores if core.cpus.meets(own)]
    if not {vcpu.tid for vcpu in guest.vcpus} <= {thread.tid for thread in threads}:
        return not_measured(CORE_SMT, guest.name, SHARED, "the guest's vCPU threads ended while they were looked at")
    if not cores:
        return not_measured(CORE_SMT, guest.name, SHARED, "no vCPU is pinned to one CPU, so no core is the guest's")
    # One pass over all threads: a large host has thousands of them, and a hundred guests.
    others = {other.pid: other.name for other in guests if other.name != guest.name}
    near = [thread for thread in threads if thread.pid in others and thread.allowed.meets(own)]
    for core in cores:
        shared = core.cpus & housekeeping
        if shared:
            faults.append(f"core {core.cpus}: CPU {shared} is a housekeeping CPU")
        for pid, name in others.items() if near else ():
            sharing = [thread for thread in near if thread.pid == pid and thread.allowed.meets(core.cpus)]
            used = CpuSet.of(cpu for thread in sharing for cpu in thread.allowed.ids) & core.cpus
            if used:
                faults.append(f"core {core.cpus}: {len(sharing)} threads of guest {name} may run on CPU {used}")
    siblings = {len(core.cpus) for core in cores}
    smt = "one thread each: there is no sibling to share" if siblings == {1} else f"{max(siblings)} SMT threads each"
    evidence = [f"cores {', '.join(str(core.cpus) for core in cores)} (/sys/devices/system/cpu/cpu*/topology), {smt}"]
    return count_faults(CORE_SMT, guest.name, SHARED, faults, evidence)


def prove_manager_core(
    managers: Mapping[str, tuple[int, ...]],
    guests: tuple[RunningGuest, ...],
    threads: tuple[Thread, ...],
    topology: Topology,
    housekeeping: CpuSet,
    last_runs: Mapping[int, float | None],
) -> Proof:
    """The manager, libvirt, and every thread of QEMU that is no vCPU run on housekeeping CPUs only.

    Args:
        managers: process ids by the name of the service they are; the first service is the manager itself and must run.
        last_runs: as for ``prove_core_exclusive``.
    """
    faults = []
    for guest in guests:
        shared = read_guest_cpus(guest, topology) & housekeeping
        if shared:
            faults.append(f"housekeeping CPU {shared} is a core of guest {guest.name}")
    manager = next(iter(managers))
    if not managers[manager]:
        return not_measured(MANAGER_CORE, "host", STRAY, f"{manager} does not run: there is no process in its cgroup")
    evidence = [f"housekeeping CPUs {housekeeping}"]
    for service, pids in managers.items():
        mine = [thread for thread in threads if thread.pid in pids]
        faults += [fault for thread in mine if (fault := _check_kept(thread, service, housekeeping, None, None))]
        count = f"{len(mine)} threads of process {', '.join(map(str, pids))}" if mine else "does not run"
        evidence.append(f"{service}: {count}")
    for guest in guests:
        helpers = [thread for thread in threads if _helps(thread, guest)]
        since = next((thread.started for thread in threads if thread.tid == guest.pid), None)
        for thread in helpers:
            fault = _check_kept(thread, f"guest {guest.name}", housekeeping, since, last_runs.get(thread.tid))
            if fault:
                faults.append(fault)
        names = _tally([thread.name for thread in helpers])
        evidence.append(f"QEMU of {guest.name}: {len(helpers)} threads that are no vCPU: {names}")
    return count_faults(MANAGER_CORE, "host", STRAY, faults, evidence)


def _describe_irqs(irqs: tuple[Irq, ...], cores: CpuSet) -> list[str]:
    """What interrupts take from the proof. One without a handler never comes."""
    near = [irq for irq in irqs if irq.name and (irq.effective or irq.affinity).meets(cores)]
    said = [f"{WEAKER}it cannot be told where an interrupt is sent: {irq}: {irq.problem}" for irq in irqs if irq.problem]
    if near:
        named = ", ".join(f"{irq.number} ({irq.name})" for irq in near[:_NAMED])
        more = f" and {len(near) - _NAMED} more" if len(near) > _NAMED else ""
        why = "the kernel manages them itself, or they were not moved"
        said.append(f"{WEAKER}{len(near)} interrupts may be sent to CPUs {cores} ({why}): {named}{more}")
    return said


def _check_vcpus(guest: RunningGuest, threads: Mapping[int, Thread]) -> list[str]:
    faults = []
    pins = Counter(vcpu.pin for vcpu in guest.vcpus)
    for vcpu in guest.vcpus:
        thread = threads[vcpu.tid]
        if len(vcpu.pin) != 1:
            faults.append(f"vCPU {vcpu.index} is not pinned to one CPU but to {vcpu.pin}")
        elif pins[vcpu.pin] > 1:
            faults.append(f"vCPU {vcpu.index} shares CPU {vcpu.pin} with another vCPU of the guest")
        elif not thread.allowed <= vcpu.pin:
            faults.append(f"vCPU {vcpu.index}: its thread {thread} may run on {thread.allowed}, not only on its CPU {vcpu.pin}")
        elif thread.last_cpu not in vcpu.pin:
            faults.append(f"vCPU {vcpu.index}: its thread {thread} last ran on CPU {thread.last_cpu}, not on its CPU {vcpu.pin}")
    return faults


def _check_foreign(
    thread: Thread, guest: RunningGuest, cores: CpuSet, since: float, last_run: float | None, notes: defaultdict[str, list[str]]
) -> str | None:
    """What is wrong with a thread that is none of the guest's vCPUs; what is not wrong but worth telling goes to the notes."""
    may_run, ran = thread.allowed.meets(cores), thread.last_cpu in cores
    if may_run and thread.kernel and thread.pinned_by_kernel and len(thread.allowed) == 1:
        notes["bound to these CPUs by the kernel itself, one CPU each, unmovable"].append(thread.name)
        return None
    if may_run and not _is_rescuer(thread):
        return f"{thread} may run on CPU {thread.allowed & cores} (allowed {thread.allowed}, last ran on {thread.last_cpu})"
    if not ran:
        if may_run:
            notes["rescuer workqueue threads, unmovable, which never last ran here"].append(thread.name)
        return None
    if last_run is not None and last_run < since:
        notes["ran here last before the guest started"].append(thread.name)
        return None
    if thread.pid == guest.pid and last_run is not None and last_run < since + _SET_UP and not may_run:
        notes["QEMU's own, born here while the guest was set up, confined elsewhere since"].append(thread.name)
        return None
    if last_run is None:
        when = "the kernel does not say when"
    else:
        when = f"at the latest {last_run - since:.1f} s after the guest's start"
    return f"{thread} last ran on CPU {thread.last_cpu}, {when} (allowed {thread.allowed})"


def _check_kept(thread: Thread, owner: str, housekeeping: CpuSet, since: float | None, last_run: float | None) -> str | None:
    if not thread.allowed <= housekeeping:
        return f"{owner}: {thread} may run on {thread.allowed}"
    if thread.last_cpu in housekeeping:
        return None
    if since is not None and last_run is not None and last_run < since + _SET_UP:
        return None
    return f"{owner}: {thread} last ran on CPU {thread.last_cpu}"


def _is_rescuer(thread: Thread) -> bool:
    """A workqueue's rescuer: it follows the work it rescues to any CPU and cannot be moved (kernel/workqueue.c, rescuer_thread).

    Unbound workers (``kworker/u...``) are as unmovable by sched_setaffinity(2), but not by the workqueue cpumask
    (Documentation/core-api/workqueue.rst), so they are no exception.
    """
    return thread.kernel and thread.pinned_by_kernel and len(thread.allowed) > 1 and not thread.name.startswith("kworker/u")


def _helps(thread: Thread, guest: RunningGuest) -> bool:
    """Whether a thread works for a guest without being a vCPU: in QEMU's process, or a kernel thread named after it."""
    if thread.pid == guest.pid:
        return thread.tid not in {vcpu.tid for vcpu in guest.vcpus}
    return thread.kernel and thread.name in (f"kvm-pit/{guest.pid}", f"vhost-{guest.pid}")


def _tally(names: list[str]) -> str:
    """``cpuhp 2, kworker 4``: kernel threads by what comes before the CPU number."""
    kinds = Counter(name.split("/")[0].split(":")[0] if name[:1].islower() else name for name in names)
    return ", ".join(f"{kind} {count}" if count > 1 else kind for kind, count in sorted(kinds.items())) or "none"
