"""The audit: all proofs of a host and its guests, in a fixed order. What can't be measured becomes a proof that says so."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from orchestrator.audit.cores import (
    CORE_EXCLUSIVE,
    CORE_SMT,
    FOREIGN,
    MANAGER_CORE,
    SHARED,
    STRAY,
    prove_core_exclusive,
    prove_core_smt,
    prove_manager_core,
)
from orchestrator.audit.devices import (
    DEVICE_ISOLATED,
    DEVICES_MINIMAL,
    ISOLATED_UNIT,
    MINIMAL_UNIT,
    prove_device_isolated,
    prove_devices_minimal,
)
from orchestrator.audit.exits import EXITS, prove_exits
from orchestrator.audit.exits import UNIT as EXITS_UNIT
from orchestrator.audit.memory import MEMORY_STATIC, POOL_UNIT, prove_memory_static, prove_pool_accounting
from orchestrator.audit.memory import UNIT as MEMORY_UNIT
from orchestrator.audit.readings import read_devices, read_edges, read_last_runs, read_translation
from orchestrator.audit.traffic import Tell, find_guest_address, measure_traffic
from orchestrator.audit.vepa import UNIT as VEPA_UNIT
from orchestrator.audit.vepa import VEPA, Traffic, judge_vepa
from orchestrator.config import DaemonConfig
from orchestrator.errors import GuestError, HostError, OrchestratorError
from orchestrator.host.hugepages import read_ksm_run
from orchestrator.host.iommu import read_unsafe_interrupts
from orchestrator.host.irqs import read_irqs
from orchestrator.host.processes import read_maps, read_services, survey_threads
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor, RunningGuest
from orchestrator.model.access import MANAGER, Identity
from orchestrator.model.exits import ExitPolicy, ExitSample
from orchestrator.model.proof import Proof, Verdict, not_measured
from orchestrator.model.topology import Topology
from orchestrator.values import CpuSet

_log = logging.getLogger(__name__)

_Value = TypeVar("_Value")

# The manager first; then libvirt's daemons, monolithic and modular (libvirt.org/daemons.html), of which not all run.
_SERVICES = ("nohyped.service", "libvirtd.service", "virtqemud.service", "virtlogd.service", "virtlockd.service")
_WINDOW = 5.0

ReadExits = Callable[[UUID], tuple[Mapping[str, int], ...]]
"""KVM's counters of a guest, by its id."""


class Manager(Protocol):
    """What the audit asks of the system manager."""

    def survey(self) -> Topology:
        """What the host has now."""
        ...

    def tell(self, who: Identity, name: str, line: str, timeout: float, uuid: UUID) -> str:
        """Types a line on the console of the guest of this name and id, and returns the answer."""
        ...


@dataclass(frozen=True)
class Auditor:
    """Puts the audit together for the daemon."""

    host: HostRoot
    hypervisor: Hypervisor
    manager: Manager
    config: DaemonConfig

    def run(self, frames: int) -> tuple[Proof, ...]:
        """All proofs.

        Args:
            frames: how many frames to send from guest to guest for ``vepa``; 0 for none.

        Raises:
            OrchestratorError: the host can't be surveyed, or libvirt does not answer: then nothing can be said at all.
        """
        policy = ExitPolicy(self.config.exits.total, self.config.exits.emulated)
        guests, unread = self.hypervisor.read_guests()
        ids = {guest.name: guest.uuid for guest in guests}

        def tell(name: str, line: str, timeout: float) -> str:
            return self.manager.tell(MANAGER, name, line, timeout, ids[name])

        return run_audit(
            self.host, guests, self.manager.survey(), self.hypervisor.read_exits, tell, unread=unread,
            housekeeping=self.config.host.housekeeping_cpus, policy=policy, manager_pid=os.getpid(), frames=frames,
        )  # fmt: skip


def run_audit(
    host: HostRoot,
    guests: tuple[RunningGuest, ...],
    topology: Topology,
    read_exits: ReadExits,
    tell: Tell,
    *,
    housekeeping: CpuSet,
    policy: ExitPolicy,
    unread: Mapping[str, str] | None = None,
    manager_pid: int | None = None,
    frames: int = 0,
    window: float = _WINDOW,
) -> tuple[Proof, ...]:
    """All proofs, in the order of docs/promises.md. Takes ``window`` seconds at least, and changes nothing on the host.

    Args:
        read_exits: KVM's counters of a guest, one mapping a vCPU.
        tell: asks a guest on its console; used only with ``frames``.
        housekeeping: the CPUs that are for the manager and the kernel.
        unread: guests that libvirt or QEMU could not describe, and why.
        manager_pid: the manager's process; None to find it by its systemd unit alone.
        frames: how many frames to send from guest to guest; 0 for none.
        window: seconds over which exits are counted.
    """
    audit = _Audit(host, guests, topology, housekeeping, manager_pid)
    before = {guest.name: _Reading(partial(_sample_exits, read_exits, guest.uuid)) for guest in guests}

    def measure_exits(guest: RunningGuest) -> Proof:
        first = before[guest.name].value()
        time.sleep(max(0.0, first.time + window - time.monotonic()))
        return prove_exits(guest.name, first, _sample_exits(read_exits, guest.uuid), policy)

    def of_each(name: str, unit: str, prove: Callable[[RunningGuest], Proof]) -> list[Proof]:
        return [_measured(name, guest.name, unit, partial(prove, guest)) for guest in guests]

    proofs = [
        *of_each(CORE_EXCLUSIVE, FOREIGN, audit.prove_core_exclusive),
        *of_each(CORE_SMT, SHARED, audit.prove_core_smt),
        _measured(MANAGER_CORE, "host", STRAY, audit.prove_manager_core),
        *of_each(MEMORY_STATIC, MEMORY_UNIT, audit.prove_memory_static),
        _measured(MEMORY_STATIC, "host", POOL_UNIT, audit.prove_pool_accounting),
        *of_each(DEVICE_ISOLATED, ISOLATED_UNIT, audit.prove_device_isolated),
    ]
    # The exits are counted before the frames are sent, which make the guests exit.
    exits = of_each(EXITS, EXITS_UNIT, measure_exits)
    vepa = _measured(VEPA, "host", VEPA_UNIT, partial(_prove_vepa, host, guests, topology, tell, frames))
    missing = [not_measured(CORE_EXCLUSIVE, name, FOREIGN, why) for name, why in sorted((unread or {}).items())]
    return (*missing, *proofs, vepa, *of_each(DEVICES_MINIMAL, MINIMAL_UNIT, audit.prove_devices_minimal), *exits)


class _Audit:
    """One audit: what several proofs need is read once, at its beginning."""

    def __init__(
        self, host: HostRoot, guests: tuple[RunningGuest, ...], topology: Topology, housekeeping: CpuSet, manager_pid: int | None
    ) -> None:
        self._host, self._guests, self._topology = host, guests, topology
        self._housekeeping, self._manager_pid = housekeeping, manager_pid
        self._threads = _Reading(partial(survey_threads, host))
        self._irqs = _Reading(partial(read_irqs, host))
        self._runs = _Reading(lambda: read_last_runs(host, guests, self._threads.value()[0], topology))
        self._maps = {guest.name: _Reading(partial(read_maps, host, guest.pid)) for guest in guests}

    def prove_core_exclusive(self, guest: RunningGuest) -> Proof:
        threads, problems = self._threads.value()
        proof = prove_core_exclusive(guest, threads, self._topology, self._runs.value(), self._irqs.value())
        return _lacking(proof, problems)

    def prove_core_smt(self, guest: RunningGuest) -> Proof:
        threads, problems = self._threads.value()
        return _lacking(prove_core_smt(guest, self._guests, threads, self._topology, self._housekeeping), problems)

    def prove_manager_core(self) -> Proof:
        services = read_services(self._host, _SERVICES)
        if self._manager_pid is not None:
            services[_SERVICES[0]] = tuple(sorted({*services[_SERVICES[0]], self._manager_pid}))
        (threads, problems), runs = self._threads.value(), self._runs.value()
        proof = prove_manager_core(services, self._guests, threads, self._topology, self._housekeeping, runs)
        return _lacking(proof, problems)

    def prove_memory_static(self, guest: RunningGuest) -> Proof:
        return prove_memory_static(guest, self._maps[guest.name].value(), self._topology, read_ksm_run(self._host))

    def prove_pool_accounting(self) -> Proof:
        return prove_pool_accounting(self._topology.pools, {name: found.value() for name, found in self._maps.items()})

    def prove_device_isolated(self, guest: RunningGuest) -> Proof:
        translation = read_translation(self._host, guest, self._maps[guest.name].value())
        unsafe = read_unsafe_interrupts(self._host)
        return prove_device_isolated(guest, read_devices(self._host, guest), translation, unsafe, self._topology.cmdline)

    def prove_devices_minimal(self, guest: RunningGuest) -> Proof:
        threads, problems = self._threads.value()
        return _lacking(prove_devices_minimal(guest, threads), problems)


class _Reading(Generic[_Value]):
    """Something read once, at once, that several proofs need: each of them gets the value or the same error."""

    def __init__(self, read: Callable[[], _Value]) -> None:
        self._error: Exception | None = None
        try:
            self._value = read()
        except Exception as error:
            self._error = error

    def value(self) -> _Value:
        if self._error is not None:
            raise self._error
        return self._value


def _measured(name: str, subject: str, unit: str, prove: Callable[[], Proof]) -> Proof:
    """The proof, or one that says why it could not be measured: no error is let through, and none makes a proof pass."""
    try:
        return prove()
    except OrchestratorError as error:
        return not_measured(name, subject, unit, error.message)
    except Exception as error:
        # A kernel that writes a file in another way than we know must not hide what the other proofs say.
        _log.exception("the proof %s of %s could not be measured", name, subject)
        return not_measured(name, subject, unit, f"what was read could not be understood: {type(error).__name__}: {error}")


def _lacking(proof: Proof, problems: tuple[HostError, ...]) -> Proof:
    """The proof, which does not pass if some threads could not be read: a fault that was found stays one."""
    if not problems or proof.verdict is not Verdict.PASS:
        return proof
    reason = f"{len(problems)} threads could not be read: {'; '.join(problem.message for problem in problems[:3])}"
    return not_measured(proof.name, proof.subject, proof.unit, reason)


def _sample_exits(read: ReadExits, uuid: UUID) -> ExitSample:
    return ExitSample(time.monotonic(), read(uuid))


def _prove_vepa(host: HostRoot, guests: tuple[RunningGuest, ...], topology: Topology, tell: Tell, frames: int) -> Proof:
    traffic: Traffic | None = None
    gaps: tuple[str, ...] = ()
    if frames:
        try:
            traffic = _send(host, guests, tell, frames)
        except OrchestratorError as error:
            gaps = (error.message,)
    # Read after the traffic: if a PF was reset meanwhile, it shows.
    return judge_vepa(read_edges(host, guests, topology), traffic, None, gaps)


def _send(host: HostRoot, guests: tuple[RunningGuest, ...], tell: Tell, frames: int) -> Traffic:
    ends = [
        (guest.name, address) for guest in guests if guest.hostdevs and (address := find_guest_address(host, guest)) is not None
    ]
    if len(ends) < 2:
        raise GuestError(f"two guests with an address and a virtual function are needed; {len(ends)} such guests run")
    return measure_traffic(tell, ends[0], ends[1], frames)
