"""The core manager of one guest: prepares its cores, memory and VF, starts it there, and does nothing until it has ended;
then it gives all of it back, and looks whether that is so. Between the two no code of ours runs for the guest.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from errno import ENOENT, ESRCH
from pathlib import Path
from uuid import UUID

from orchestrator.domain import build_domain
from orchestrator.errors import GuestError, HostError, NotFound
from orchestrator.guests.console_logs import ConsoleLogs
from orchestrator.guests.host_warnings import HostWarnings
from orchestrator.host.cgroups import confine, move_thread, read_cgroup
from orchestrator.host.cpus import read_online
from orchestrator.host.edge import EdgeMode, read_edge_mode
from orchestrator.host.hugepages import survey_pools
from orchestrator.host.ports import find_port, has_port
from orchestrator.host.processes import read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_numvfs, read_pf
from orchestrator.hypervisor.connection import Hypervisor, LiveGuest
from orchestrator.images.store import find_build
from orchestrator.ledger import Claim, Ledger
from orchestrator.model.plan import Plan, Policy
from orchestrator.model.state import GuestState
from orchestrator.model.topology import VfState
from orchestrator.resources.cores import check_confinement, clear_cores
from orchestrator.resources.memory import TakePages
from orchestrator.resources.nic import BindVfio, ConfigureVf, CreateVfs, VfStates, find_still_bound
from orchestrator.resources.step import GuestContext, Step, UndoContext, run_steps, undo_steps
from orchestrator.resources.uplink import SetEdgeMode
from orchestrator.values import CpuSet, PciAddress, Size

HOST = "host"
"""Owner, in the undo journal, of changes that serve all guests: undone when the last guest is gone. No guest's name."""

# Guests that are started at a time: all of that is work of the housekeeping cores. Their ends never wait.
_AT_A_TIME = 8
_FIRST_EXIT = 60.0


@dataclass(frozen=True)
class CoreManager:
    """What starting and ending a guest takes. The caller sees to it that nobody else works on the same guest meanwhile.

    Attributes:
        warnings: gets what could not be moved off the guest cores.
        shared: held while something is changed that serves all guests.
        images: folder of the built guest images.
        logs: where what guests print is kept.
    """

    host: HostRoot
    hypervisor: Hypervisor
    ledger: Ledger
    policy: Policy
    warnings: HostWarnings
    shared: AbstractContextManager[object]
    images: Path
    logs: ConsoleLogs
    _prepared: set[PciAddress] = field(default_factory=set)
    """PFs whose VFs are made, by this manager or before. As long as there are some, the kernel's movable threads and interrupts
    are off the guest cores. Changed with ``shared`` held."""
    _hurried: set[UUID] = field(default_factory=set)
    """Guests whose ``shut_down`` is to wait no longer. A word that came too late is forgotten at the next start."""
    launched: set[UUID] = field(default_factory=set)
    """Guests whose QEMU was started by this manager: it has all its pages, and may not have ended yet."""
    _turns: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(_AT_A_TIME))

    @property
    def housekeeping(self) -> CpuSet:
        """The housekeeping CPUs that are online; all of them if none is: the kernel confines nothing to offline CPUs."""
        housekeeping = self.policy.housekeeping
        return housekeeping & read_online(self.host) or housekeeping

    def start(self, plan: Plan, owner: str) -> tuple[str, ...]:
        """Prepares the host and starts the guest; returns once its vCPUs run and every other thread of QEMU is off its cores.

        libvirt's daemon runs on housekeeping CPUs, gives QEMU's first thread the affinity of ``emulatorpin`` before QEMU's first
        instruction, and pins each vCPU before the guest's (qemuProcessLaunch): so no thread of it is ever on another's core.

        Args:
            owner: the tenant that the guest belongs to, empty for the host's own.

        Returns:
            What was changed on the host, in words.

        Raises:
            OrchestratorError: the kernel or libvirt refused, or the guest ended at once; the caller cleans up.
        """
        if offline := self.find_offline(plan):
            hint = "set them online (echo 1 > /sys/devices/system/cpu/cpuN/online), or delete the guest and create it again"
            raise HostError(f"CPUs {offline} of guest {plan.name} are offline", hint)
        image, log = find_build(self.images, plan.image), self.logs.begin(plan, owner)
        self._hurried.discard(plan.uuid)
        with self._turns:
            changed = self._prepare(plan)
            self.hypervisor.start(build_domain(plan, image, self.housekeeping, log=log))
            self.launched.add(plan.uuid)
        try:
            self.settle(plan)
            return changed
        except (NotFound, HostError):
            if plan.uuid in self.hypervisor.uuids():
                raise
            raise GuestError(
                f"guest {plan.name} ended as soon as it was started",
                f"the last it printed is in {log}, QEMU's own words are in /var/log/libvirt/qemu/{plan.name}.log",
            ) from None

    def settle(self, plan: Plan) -> None:
        """Lets a guest run that was created, once none of its threads can reach another guest's core. May be done again.

        Raises:
            NotFound: it has ended.
            HostError: a thread may run where it must not; with both sets.
        """
        live = self.hold(plan)
        if self.hypervisor.is_paused(plan.uuid):
            self.hypervisor.resume(plan.uuid)
        self._await_first_exit(plan)
        _move_helpers(self.host, live)

    def hold(self, plan: Plan) -> LiveGuest:
        """Confines a guest to its cores and housekeeping, and looks whether none of its threads can reach beyond.

        Raises:
            As ``settle``.
        """
        live, housekeeping = self.hypervisor.guest(plan.uuid), self.housekeeping
        own = CpuSet.of(plan.cpus)
        # libvirt: SCOPE/libvirt/{emulator,vcpuN}; the scope holds them all.
        scope = read_cgroup(self.host, live.pid, live.pid).partition("/libvirt/")[0]
        confine(self.host, scope, own | housekeeping)
        check_confinement(plan, housekeeping, live, read_process_threads(self.host, live.pid))
        return live

    def shut_down(self, plan: Plan, timeout: float) -> bool:
        """Presses the guest's power button and waits, at most ``timeout`` seconds, for its end; returns whether it has ended."""
        self.hypervisor.shutdown(plan.uuid)
        deadline = time.monotonic() + timeout
        while plan.uuid in self.hypervisor.uuids():
            if time.monotonic() > deadline or plan.uuid in self._hurried:
                return False
            time.sleep(0.2)
        return True

    def hurry(self, plan: Plan) -> None:
        """Makes a ``shut_down`` of this guest that waits in another thread wait no longer."""
        self._hurried.add(plan.uuid)

    def clean(self, plan: Plan) -> tuple[str, ...]:
        """Ends the guest if it runs, undoes what was done for it, and looks whether all that it had is clean.

        Returns:
            What is not, a sentence each; nothing if all is.

        Raises:
            HypervisorError: libvirt does not answer, so that nothing can be said.
        """
        self.hypervisor.destroy(plan.uuid)
        self.launched.discard(plan.uuid)
        self._hurried.discard(plan.uuid)
        try:
            undo_steps(UndoContext(self.host, self._context(plan)), self.ledger, plan.name)
            return find_still_bound(self.host, plan)
        except HostError as error:
            return (error.message,)

    def _context(self, plan: Plan) -> GuestContext:
        return GuestContext(plan, self.ledger, self.hypervisor)

    def forget(self, plan: Plan) -> None:
        """Drops what could not be undone for the guest: an operator has seen to it."""
        for record in self.ledger.pending(plan.name):
            self.ledger.forget(record.id)

    def release_host(self) -> None:
        """Undoes what serves all guests, if there is none.

        Raises:
            HostError: what could not be undone stays in the journal.
        """
        if self.ledger.read().claims:
            return
        with self.shared:
            # In this order: a guest that is claimed after we looked finds nothing prepared, and waits for us.
            self._prepared.clear()
            if not self.ledger.read().claims:
                undo_steps(UndoContext(self.host), self.ledger, HOST)

    def keep_edge_mode(self, plan: Plan) -> None:
        """Puts the guest's PF back into VEPA mode if something took it out of it.

        Raises:
            HostError: the PF is gone, or refuses.
        """
        for address, interface in {nic.pf: nic.interface for nic in plan.nics}.items():
            pf = read_pf(self.host, address, [interface, *self.policy.uplinks])
            if read_edge_mode(self.host, pf) is not EdgeMode.VEPA:
                with self.shared:
                    run_steps(self.host, self.ledger, HOST, [SetEdgeMode(pf, EdgeMode.VEPA)])

    def has_interface(self, plan: Plan, interface: str) -> bool:
        """Whether an interface is the guest's PF's, by the name that it had or has now."""
        return any(nic.interface == interface or has_port(self.host, nic.pf, interface) for nic in plan.nics)

    def find_offline(self, plan: Plan) -> CpuSet:
        """The guest's CPUs that are offline: the kernel lets its threads run on housekeeping CPUs in place of them."""
        return CpuSet.of(plan.cpus) - read_online(self.host)

    def read_vfs(self) -> VfStates:
        """What the PFs that guests have VFs of enforce for all their VFs."""
        names = {nic.pf: nic.interface for claim in self.ledger.read().claims for nic in claim.plan.nics}
        return {pf: self._read_vfs(pf, name) for pf, name in names.items()}

    def _read_vfs(self, pf: PciAddress, name: str) -> tuple[VfState, ...] | str:
        try:
            return self.host.net.read_vfs(find_port(self.host, pf, [name, *self.policy.uplinks], odd=True))
        except HostError as error:
            return error.message

    def check_pools(self, claims: tuple[Claim, ...]) -> tuple[str, ...]:
        """Whether the pools still have what stopped guests own there; if not, another program has taken it. A sentence each."""
        waiting: Counter[tuple[int, Size]] = Counter()
        for claim in claims:
            if claim.state == GuestState.STOPPED:
                waiting[claim.plan.node, claim.plan.page_size] += claim.plan.pages
        pools, problems = survey_pools(self.host)
        free = {(pool.node, pool.page_size): pool.free for pool in pools}
        unread = f" ({'; '.join(problem.message for problem in problems)})" if problems else ""
        return tuple(
            f"{left} huge pages of {size} are free on node {node}, but stopped guests own {owned}{unread}"
            for (node, size), owned in sorted(waiting.items())
            if (left := free.get((node, size), 0)) < owned
        )

    def _prepare(self, plan: Plan) -> tuple[str, ...]:
        """First what serves all guests, then what is this guest's. Each step checks whether there is anything to do."""
        changed: tuple[str, ...] = ()
        for pf, interface in {nic.pf: nic.interface for nic in plan.nics}.items():
            if pf not in self._prepared or not read_numvfs(self.host, pf):
                changed += self.make_vfs(pf, interface)
        own: list[Step] = [TakePages(self._context(plan))]
        for nic in plan.nics:
            own += [ConfigureVf(nic), BindVfio(nic)]
        changed += run_steps(self.host, self.ledger, plan.name, own)
        self.keep_edge_mode(plan)
        return changed

    def make_vfs(self, address: PciAddress, interface: str) -> tuple[str, ...]:
        """Does what serves all guests of a PF, its VFs included; returns what was changed, in words.

        Raises:
            HostError: the kernel refused; what was done is in the journal, and undone with the last guest.
        """
        moved: tuple[str, ...] = ()
        housekeeping = self.housekeeping
        with self.shared:
            if not self._prepared:
                # Once: it looks at every thread of the host. What strays later is found by the audit. Once for each manager too,
                # since the journal outlives a reboot and the affinities do not.
                cleared = clear_cores(self.host, self.ledger, HOST, housekeeping)
                self.warnings.report("not moved off the guest cores", cleared.left)
                moved = cleared.moved
            pf = read_pf(self.host, address)
            made = run_steps(self.host, self.ledger, HOST, [CreateVfs(pf.address, interface, self.policy.count_vfs(pf))])
            self._prepared.add(pf.address)
        return (*((f"move {len(moved)} threads and interrupts to CPUs {housekeeping}",) if moved else ()), *made)

    def _await_first_exit(self, plan: Plan) -> None:
        """KVM makes its helper thread when a vCPU first runs; a vCPU that has exited once has run."""
        deadline = time.monotonic() + _FIRST_EXIT
        while not all(vcpu.get("exits", 1) for vcpu in self.hypervisor.read_exits(plan.uuid)[:1]):
            if time.monotonic() > deadline:
                raise GuestError(f"guest {plan.name} did not run a single instruction within {_FIRST_EXIT:g} s")
            time.sleep(0.1)


def _move_helpers(host: HostRoot, guest: LiveGuest) -> None:
    """KVM's kvm-nx-lpage-recovery is a thread of the process whose vCPU ran first and inherits that vCPU's cgroup
    (kernel 6.12, virt/kvm: vhost_task_create from the vCPU's first KVM_RUN).
    """
    vcpus = {vcpu.tid for vcpu in guest.vcpus}
    emulator = read_cgroup(host, guest.pid, guest.pid)
    for thread in read_process_threads(host, guest.pid):
        if thread.tid not in vcpus and not thread.allowed <= guest.emulator_pin:
            try:
                move_thread(host, thread.tid, emulator)
            except HostError as error:
                # It has ended: the write says ESRCH, reading back ENOENT.
                if error.errno not in (ENOENT, ESRCH):
                    raise
