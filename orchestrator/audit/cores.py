"""core-exclusive, core-smt and manager-core: which threads may run, and ran, on which CPU. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from orchestrator.host.irqs import Irq
from orchestrator.host.processes import Thread
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import WEAKER, Measurement, count_findings, not_measured
from orchestrator.model.topology import Topology
from orchestrator.values import CpuSet

# Seconds. QEMU's helper threads, and KVM's threads in QEMU's process, may be created on a guest core. The manager moves them
# while it launches the guest, which takes at most this long until the first instruction.
_SETUP_TIME = 60.0
_NAMED = 5
_EXITED = "the guest's vCPU threads exited during the measurement"


def read_guest_cpus(guest: RunningGuest, topology: Topology) -> CpuSet:
    """The CPUs to which single vCPUs are pinned, and all their SMT siblings."""
    pinned = CpuSet.of(cpu for vcpu in guest.vcpus if len(vcpu.pin) == 1 for cpu in vcpu.pin)
    return topology.siblings(pinned)


def find_ambiguous_threads(guests: Iterable[RunningGuest], threads: Iterable[Thread], topology: Topology) -> tuple[Thread, ...]:
    """Threads that last ran on a guest core but may not run there now: the time of that run decides."""
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
) -> Measurement:
    """Only the guest's vCPUs run on its cores, each on its own CPU. ``threads`` and ``irqs`` are all of the host.

    Args:
        last_runs: for ``find_ambiguous_threads``: thread id → latest second after boot at which it can have run.
        irqs: an interrupt that may be sent to the guest's cores limits the proof.
    """
    cores = read_guest_cpus(guest, topology)
    vcpus = {vcpu.tid for vcpu in guest.vcpus}
    by_tid = {thread.tid: thread for thread in threads}
    if not vcpus or not vcpus <= by_tid.keys():
        return not_measured(_EXITED)
    findings = _check_vcpus(guest, by_tid)
    since = min(by_tid[tid].started for tid in vcpus)
    notes: defaultdict[str, list[str]] = defaultdict(list)
    for thread in threads:
        if thread.tid in vcpus:
            continue
        finding = _check_other_thread(thread, guest, cores, since, last_runs.get(thread.tid), notes)
        if finding:
            findings.append(finding)
    pins = ", ".join(f"vCPU {vcpu.index} → {vcpu.pin}" for vcpu in guest.vcpus)
    evidence = [
        f"CPUs {cores}: {len(threads)} threads of {len({thread.pid for thread in threads})} processes read from "
        "/proc/*/task/*/{stat,status}, kernel threads included",
        f"pinned ({guest.name}, pid {guest.pid}): {pins}",
    ]
    evidence += [f"{why}: {_tally(names)}" for why, names in notes.items()]
    evidence += _describe_irqs(irqs, cores)
    return count_findings(findings, evidence)


def prove_core_smt(
    guest: RunningGuest, guests: tuple[RunningGuest, ...], threads: tuple[Thread, ...], topology: Topology, housekeeping: CpuSet
) -> Measurement:
    """No SMT sibling of a guest core belongs to another guest or to housekeeping.

    ``guests`` and ``threads`` are all of the host. The threads' affinities decide, not their pinning in libvirt.
    """
    findings = []
    own = read_guest_cpus(guest, topology)
    cores = [core for core in topology.cores if core.cpus.meets(own)]
    if not {vcpu.tid for vcpu in guest.vcpus} <= {thread.tid for thread in threads}:
        return not_measured(_EXITED)
    if not cores:
        return not_measured("no vCPU is pinned to a single CPU, so the guest owns no core")
    # One pass over all threads: a large host has thousands of them, and a hundred guests.
    others = {other.pid: other.name for other in guests if other.name != guest.name}
    near = [thread for thread in threads if thread.pid in others and thread.allowed.meets(own)]
    for core in cores:
        shared = core.cpus & housekeeping
        if shared:
            findings.append(f"core {core.cpus}: CPU {shared} is a housekeeping CPU")
        for pid, name in others.items() if near else ():
            sharing = [thread for thread in near if thread.pid == pid and thread.allowed.meets(core.cpus)]
            used = CpuSet.of(cpu for thread in sharing for cpu in thread.allowed.ids) & core.cpus
            if used:
                findings.append(f"core {core.cpus}: {len(sharing)} threads of guest {name} may run on CPU {used}")
    siblings = {len(core.cpus) for core in cores}
    smt = "one thread each: there is no sibling to share" if siblings == {1} else f"{max(siblings)} SMT threads each"
    evidence = [f"cores {', '.join(str(core.cpus) for core in cores)} (/sys/devices/system/cpu/cpu*/topology), {smt}"]
    return count_findings(findings, evidence)


def prove_manager_core(
    managers: Mapping[str, tuple[int, ...]],
    guests: tuple[RunningGuest, ...],
    threads: tuple[Thread, ...],
    topology: Topology,
    housekeeping: CpuSet,
    last_runs: Mapping[int, float | None],
) -> Measurement:
    """The manager, libvirt and all non-vCPU threads of QEMU run only on housekeeping CPUs.

    Args:
        managers: process ids by service; the first service is the manager itself, which must run.
        last_runs: as for ``prove_core_exclusive``.
    """
    findings = []
    for guest in guests:
        shared = read_guest_cpus(guest, topology) & housekeeping
        if shared:
            findings.append(f"housekeeping CPU {shared} is a core of guest {guest.name}")
    manager = next(iter(managers))
    if not managers[manager]:
        return not_measured(f"{manager} is not running: there is no process in its cgroup")
    evidence = [f"housekeeping CPUs {housekeeping}"]
    for service, pids in managers.items():
        own = [thread for thread in threads if thread.pid in pids]
        findings += [finding for thread in own if (finding := _check_confined(thread, service, housekeeping, None, None))]
        count = f"{len(own)} threads of process {', '.join(map(str, pids))}" if own else "not running"
        evidence.append(f"{service}: {count}")
    for guest in guests:
        helpers = [thread for thread in threads if _is_helper(thread, guest)]
        since = next((thread.started for thread in threads if thread.tid == guest.pid), None)
        for thread in helpers:
            finding = _check_confined(thread, f"guest {guest.name}", housekeeping, since, last_runs.get(thread.tid))
            if finding:
                findings.append(finding)
        names = _tally([thread.name for thread in helpers])
        evidence.append(f"QEMU of {guest.name}: {len(helpers)} non-vCPU threads: {names}")
    return count_findings(findings, evidence)


def _describe_irqs(irqs: tuple[Irq, ...], cores: CpuSet) -> list[str]:
    """Limits of the proof. An interrupt without a handler does not occur."""
    near = [irq for irq in irqs if irq.name and (irq.effective or irq.affinity).meets(cores)]
    limits = [f"{WEAKER}the CPUs of an interrupt are unknown: {irq}: {irq.problem}" for irq in irqs if irq.problem]
    if near:
        named = ", ".join(f"{irq.number} ({irq.name})" for irq in near[:_NAMED])
        more = f" and {len(near) - _NAMED} more" if len(near) > _NAMED else ""
        why = "managed by the kernel, or not moved"
        limits.append(f"{WEAKER}{len(near)} interrupts may be sent to CPUs {cores} ({why}): {named}{more}")
    return limits


def _check_vcpus(guest: RunningGuest, threads: Mapping[int, Thread]) -> list[str]:
    findings = []
    pins = Counter(vcpu.pin for vcpu in guest.vcpus)
    for vcpu in guest.vcpus:
        thread = threads[vcpu.tid]
        if len(vcpu.pin) != 1:
            findings.append(f"vCPU {vcpu.index} is pinned to {vcpu.pin}, expected a single CPU")
        elif pins[vcpu.pin] > 1:
            findings.append(f"vCPU {vcpu.index} shares CPU {vcpu.pin} with another vCPU of the guest")
        elif not thread.allowed <= vcpu.pin:
            findings.append(f"vCPU {vcpu.index}: thread {thread} may run on {thread.allowed}, expected {vcpu.pin}")
        elif thread.last_cpu not in vcpu.pin:
            findings.append(f"vCPU {vcpu.index}: thread {thread} last ran on CPU {thread.last_cpu}, expected {vcpu.pin}")
    return findings


def _check_other_thread(
    thread: Thread, guest: RunningGuest, cores: CpuSet, since: float, last_run: float | None, notes: defaultdict[str, list[str]]
) -> str | None:
    """For a thread that is not a vCPU of the guest; adds permitted threads to the notes."""
    may_run, ran = thread.allowed.meets(cores), thread.last_cpu in cores
    if may_run and thread.kernel and thread.pinned_by_kernel and len(thread.allowed) == 1:
        notes["per-CPU kernel threads, unmovable"].append(thread.name)
        return None
    if may_run and not _is_rescuer(thread):
        return f"{thread} may run on CPU {thread.allowed & cores} (allowed {thread.allowed}, last ran on {thread.last_cpu})"
    if not ran:
        if may_run:
            notes["rescuers, unmovable, last ran elsewhere"].append(thread.name)
        return None
    if last_run is not None and last_run < since:
        notes["last ran here before the guest started"].append(thread.name)
        return None
    if thread.pid == guest.pid and last_run is not None and last_run < since + _SETUP_TIME and not may_run:
        notes["QEMU threads created during guest setup, since confined to other CPUs"].append(thread.name)
        return None
    if last_run is None:
        when = "at a time that the kernel does not report"
    else:
        when = f"no later than {last_run - since:.1f} s after the guest started"
    return f"{thread} last ran on CPU {thread.last_cpu}, {when} (allowed {thread.allowed})"


def _check_confined(thread: Thread, owner: str, housekeeping: CpuSet, since: float | None, last_run: float | None) -> str | None:
    if not thread.allowed <= housekeeping:
        return f"{owner}: {thread} may run on {thread.allowed}"
    if thread.last_cpu in housekeeping:
        return None
    if since is not None and last_run is not None and last_run < since + _SETUP_TIME:
        return None
    return f"{owner}: {thread} last ran on CPU {thread.last_cpu}"


def _is_rescuer(thread: Thread) -> bool:
    # A rescuer follows the work that it rescues to any CPU and cannot be moved (kernel/workqueue.c, rescuer_thread()).
    # sched_setaffinity(2) cannot move unbound workers (kworker/u...) either, but the workqueue cpumask can
    # (Documentation/core-api/workqueue.rst), so they are not exempt.
    return thread.kernel and thread.pinned_by_kernel and len(thread.allowed) > 1 and not thread.name.startswith("kworker/u")


def _is_helper(thread: Thread, guest: RunningGuest) -> bool:
    """A non-vCPU thread of QEMU's process, or a kernel thread named after it."""
    if thread.pid == guest.pid:
        return thread.tid not in {vcpu.tid for vcpu in guest.vcpus}
    return thread.kernel and thread.name in (f"kvm-pit/{guest.pid}", f"vhost-{guest.pid}")


def _tally(names: list[str]) -> str:
    """``cpuhp 2, kworker 4``: counts kernel threads by the name before the CPU number."""
    kinds = Counter(name.split("/")[0].split(":")[0] if name[:1].islower() else name for name in names)
    return ", ".join(f"{kind} {count}" if count > 1 else kind for kind, count in sorted(kinds.items())) or "none"
