"""The story of a guest from request to end, and what is done after a crash. The only place that knows the order."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from errno import ENOENT, ESRCH
from pathlib import Path
from typing import Any

from orchestrator.console import READY, tell, wait_for
from orchestrator.domain import build_domain
from orchestrator.errors import Conflict, GuestError, HostError, NotFound, OrchestratorError, RequestError
from orchestrator.host.cgroups import move_thread, read_cgroup
from orchestrator.host.edge import EdgeMode
from orchestrator.host.processes import read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor import Hypervisor, LiveGuest
from orchestrator.images.store import find_image
from orchestrator.ledger import Claim, GuestState, Ledger
from orchestrator.plan import Claims, Plan, Policy, plan_guest
from orchestrator.request import GuestRequest
from orchestrator.steps.base import Step, Undo, run_steps, undo_steps
from orchestrator.steps.cores import MoveIrq, MoveKernelThread, plan_cores, undo_irq_affinity, undo_thread_affinity
from orchestrator.steps.network import SetEdgeMode, find_pf, undo_edge_mode
from orchestrator.steps.vfs import VFIO, BindVfio, CreateVfs, SetVfMac, undo_numvfs, undo_vf_driver, undo_vf_mac
from orchestrator.topology import Topology
from orchestrator.values import PciAddress

_log = logging.getLogger(__name__)

HOST = "host"
"""Owner, in the undo journal, of changes that serve all guests: undone when the last guest has ended. No guest's name."""

_FIRST_EXIT = 60.0

UNDOS: Mapping[str, Undo] = {
    MoveKernelThread.action: undo_thread_affinity,
    MoveIrq.action: undo_irq_affinity,
    CreateVfs.action: undo_numvfs,
    SetEdgeMode.action: undo_edge_mode,
    SetVfMac.action: undo_vf_mac,
    BindVfio.action: undo_vf_driver,
}


@dataclass(frozen=True)
class GuestView:
    """A guest as the manager shows it.

    Attributes:
        state: as in the ledger; ``ended`` if it should run but does not; ``planned`` if nothing is claimed for it.
    """

    plan: Plan
    state: str

    def to_json(self) -> dict[str, Any]:
        """The guest as plain JSON types; memory in bytes."""
        plan = self.plan.to_json()
        pages = plan.pop("pages")
        sizes = {"memory": self.plan.memory.bytes, "huge_pages": pages, "page_size": self.plan.page_size.bytes}
        return {**plan, "state": self.state, "cpus": list(self.plan.cpus), **sizes}


class SystemManager:
    """Takes requests and makes guests of them, one change at a time.

    Args:
        host: the kernel's files.
        hypervisor: the connection to libvirt.
        ledger: claims and undo journal.
        policy: how the host is divided.
        images: folder of the built guest images.
        consoles: folder of the guests' console logs.
    """

    def __init__(
        self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, policy: Policy, *, images: Path, consoles: Path
    ) -> None:
        self._host, self._hypervisor, self._ledger, self._policy = host, hypervisor, ledger, policy
        self._images, self._consoles = images, consoles
        # One change at a time: two creations that read the same free pages would both be promised them.
        self._changing = threading.Lock()
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def survey(self) -> Topology:
        """What the host has now."""
        return read_topology(self._host)

    def live_guests(self) -> tuple[LiveGuest, ...]:
        """What runs now, ours or not, as libvirt and QEMU tell it."""
        return self._hypervisor.guests()

    def guests(self) -> tuple[GuestView, ...]:
        """All guests that hold a claim."""
        running = self._hypervisor.names()
        return tuple(_view(claim, running) for claim in self._ledger.read().claims)

    def guest(self, name: str) -> GuestView:
        """One guest.

        Raises:
            NotFound: no guest of this name holds a claim.
        """
        for view in self.guests():
            if view.plan.name == name:
                return view
        raise NotFound(f"there is no guest named {name}", "`nohype guest list` shows all")

    def plan(self, request: GuestRequest) -> GuestView:
        """What the guest would get, without claiming it.

        Raises:
            Conflict: the name is taken.
            RequestError, NotFound, NoRoom: see ``plan_guest`` and ``find_image``.
        """
        return GuestView(self._plan(request)[0], "planned")

    def create(self, request: GuestRequest) -> GuestView:
        """Makes a guest: plan, claim, change the host, start. On any error all of it is undone.

        Raises:
            Conflict: the name is taken.
            RequestError, NotFound, NoRoom: the request can't be met.
            HostError, HypervisorError: the kernel or libvirt refused.
        """
        with self._changing:
            plan, generation = self._plan(request)
            self._ledger.claim(plan, generation)
            try:
                self._prepare(plan)
                self._start(plan)
                self._ledger.set_state(plan.name, GuestState.RUNNING)
                self._ledger.log("created", plan.name, f"CPUs {plan.cpus}, node {plan.node}, VF {plan.vf.address}")
            except BaseException as error:
                self._clean_up_quietly(plan, "failed", str(error))
                raise
            _log.info("guest %s runs on CPUs %s", plan.name, plan.cpus)
        # Not read again: a guest that has ended meanwhile was made all the same.
        return GuestView(plan, str(GuestState.RUNNING))

    def stop(self, name: str) -> None:
        """Ends a guest at once, as pulling the plug does, and gives back all that it had.

        Raises:
            NotFound: no guest of this name holds a claim.
        """
        with self._changing:
            view = self.guest(name)
            self._ledger.set_state(name, GuestState.STOPPING)
            self._clean_up(view.plan)
            self._ledger.log("stopped", name, "on request")

    def collect(self) -> None:
        """Gives back what guests had that have ended by themselves. Guests that are not ours are left alone."""
        with self._changing:
            running = self._hypervisor.names()
            for claim in self._ledger.read().claims:
                if claim.plan.name not in running:
                    _log.info("guest %s has ended", claim.plan.name)
                    self._clean_up_quietly(claim.plan, "ended", "by itself")

    def recover(self) -> None:
        """After a start: guests that still run are kept as they are, and what dead ones left behind is undone.

        What can't be undone is logged and stays in the journal and claimed, so that nobody else gets it.
        """
        with self._changing:
            running = self._hypervisor.names()
            for claim in self._ledger.read().claims:
                if claim.plan.name in running:
                    _log.info("guest %s still runs; it is kept", claim.plan.name)
                    self._adopt(claim)
                else:
                    _log.info("guest %s is gone; what it had is given back", claim.plan.name)
                    self._clean_up_quietly(claim.plan, "ended", "while no manager ran")
            try:
                self._undo_host_if_unused()
            except OrchestratorError as error:
                _log.error("after the start: %s", error)

    def keep_edge_mode(self) -> None:
        """Puts the PFs of running guests back into VEPA mode if a PF reset took them out of it (with igb each reset does)."""
        with self._changing:
            for pf in {claim.plan.vf.pf for claim in self._ledger.read().claims}:
                try:
                    run_steps(self._host, self._ledger, HOST, [SetEdgeMode(find_pf(self._host, pf), EdgeMode.VEPA)])
                except OrchestratorError as error:
                    # The other PFs' guests must not suffer from this one.
                    _log.error("PF %s is not in VEPA mode: %s", pf, error)

    def wait_ready(self, name: str, timeout: float) -> str:
        """Waits for the guest's own word that it is ready; returns that line. See ``console.wait_for``."""
        self.guest(name)
        log = self._console_log(name)
        return wait_for(log, READY, timeout=timeout, alive=lambda: name in self._hypervisor.names()).splitlines()[-1]

    def tell(self, name: str, line: str, timeout: float) -> str:
        """Types a line on the guest's console and returns its answer. See ``console.tell``."""
        self.guest(name)
        console = self._hypervisor.guest(name).console
        if console is None:
            raise GuestError(f"guest {name} has no serial console")
        # One question at a time: answers do not say which line they answer.
        with self._asking[name]:
            return tell(console, self._console_log(name), line, timeout=timeout)

    def _console_log(self, name: str) -> Path:
        return self._consoles / f"{name}.log"

    def _plan(self, request: GuestRequest) -> tuple[Plan, int]:
        if request.name == HOST:
            raise RequestError(f"no guest can be named {HOST}: that is the host itself", "choose another name")
        find_image(self._images, request.image)
        read = self._ledger.read()
        if request.name in {claim.plan.name for claim in read.claims} | self._hypervisor.names():
            raise Conflict(f"the name {request.name} is taken", "`nohype guest list` shows all guests; choose another name")
        plans = [claim.plan for claim in read.claims]
        started = frozenset(claim.plan.name for claim in read.claims if claim.state != GuestState.CLAIMED)
        live = self._hypervisor.guests()
        topology = self.survey()
        taken = _with_strangers(Claims.of(plans, started), live, topology)
        return plan_guest(request, topology, taken, self._policy), read.generation

    def _prepare(self, plan: Plan) -> None:
        """First what serves all guests, then what is this guest's. Each step checks whether there is anything to do."""
        pf = find_pf(self._host, plan.vf.pf)
        if len(self._ledger.read().claims) == 1:
            # Only before the first guest: it looks at every thread of the host. What strays later is found by the audit.
            run_steps(self._host, self._ledger, HOST, plan_cores(self._host, plan.housekeeping))
        run_steps(self._host, self._ledger, HOST, [CreateVfs(pf.address, plan.vf.interface, self._policy.count_vfs(pf))])
        own: list[Step] = [SetVfMac(plan.vf.interface, plan.vf.index, plan.vf.mac), BindVfio(plan.vf.address)]
        run_steps(self._host, self._ledger, plan.name, own)
        run_steps(self._host, self._ledger, HOST, [SetEdgeMode(pf, EdgeMode.VEPA)])

    def _start(self, plan: Plan) -> None:
        log = self._console_log(plan.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        self._hypervisor.start(build_domain(plan, find_image(self._images, plan.image), log=log))
        try:
            self._await_first_exit(plan.name)
            _move_helpers(self._host, self._hypervisor.guest(plan.name))
        except NotFound:
            raise GuestError(
                f"guest {plan.name} ended as soon as it was started",
                f"the last it printed is in {log}, QEMU's own words are in /var/log/libvirt/qemu/{plan.name}.log",
            ) from None

    def _await_first_exit(self, name: str) -> None:
        """KVM makes its helper thread when a vCPU first runs; a vCPU that has exited once has run."""
        deadline = time.monotonic() + _FIRST_EXIT
        while not all(vcpu.get("exits", 1) for vcpu in self._hypervisor.read_exits(name)[:1]):
            if time.monotonic() > deadline:
                raise GuestError(f"guest {name} did not run a single instruction within {_FIRST_EXIT:g} s")
            time.sleep(0.1)

    def _adopt(self, claim: Claim) -> None:
        """Finishes what a manager left that was killed just after it had started the guest."""
        if claim.state == GuestState.CLAIMED:
            try:
                _move_helpers(self._host, self._hypervisor.guest(claim.plan.name))
            except OrchestratorError as error:
                _log.error("guest %s: %s", claim.plan.name, error)
            self._ledger.set_state(claim.plan.name, GuestState.RUNNING)

    def _clean_up_quietly(self, plan: Plan, event: str, why: str) -> None:
        """Cleans up after an error that is worth more than what cleaning up may meet. What stays is tried again by `stop`."""
        try:
            self._clean_up(plan)
            self._ledger.log(event, plan.name, why)
        except OrchestratorError as error:
            _log.error("cleaning up after guest %s: %s", plan.name, error)

    def _clean_up(self, plan: Plan) -> None:
        """Ends the guest if it runs and undoes what was done for it. The claim goes last: until then nobody gets its things."""
        self._hypervisor.destroy(plan.uuid)
        undo_steps(self._host, self._ledger, plan.name, UNDOS)
        self._ledger.release(plan.name)
        self._undo_host_if_unused()

    def _undo_host_if_unused(self) -> None:
        if not self._ledger.read().claims:
            undo_steps(self._host, self._ledger, HOST, UNDOS)


def _view(claim: Claim, running: frozenset[str]) -> GuestView:
    ended = claim.state == GuestState.RUNNING and claim.plan.name not in running
    return GuestView(claim.plan, "ended" if ended else str(claim.state))


def _move_helpers(host: HostRoot, guest: LiveGuest) -> None:
    """Moves helper threads of QEMU that started on a guest core to where the emulator runs.

    KVM's kvm-nx-lpage-recovery is a thread of the process whose vCPU ran first and inherits that vCPU's cgroup
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


def _with_strangers(claims: Claims, live: tuple[LiveGuest, ...], topology: Topology) -> Claims:
    """Adds what guests that are not ours use, as libvirt tells it, and VFs that somebody has handed to vfio-pci."""
    vfio = {vf.address for pf in topology.pfs for vf in pf.vfs if vf.driver == VFIO}
    devices: set[PciAddress] = vfio.union(*(guest.hostdevs for guest in live))
    cpus = claims.cpus
    for guest in live:
        for vcpu in guest.vcpus:
            # A guest that nobody has pinned may run anywhere: it claims no core, and the audit names it.
            if not topology.cpus <= vcpu.pin:
                cpus = cpus | vcpu.pin
    return dataclasses.replace(claims, cpus=cpus, vfs=claims.vfs | devices)
