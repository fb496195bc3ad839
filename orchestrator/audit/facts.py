"""Facts of the live host for the proofs. Each fact is read once, when the first proof needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from orchestrator.audit.balance import finish, take_sample
from orchestrator.audit.confinement import read_confined
from orchestrator.audit.core_history import History
from orchestrator.audit.core_quiet import Sample
from orchestrator.audit.cores import find_ambiguous_threads, read_guest_cpus
from orchestrator.audit.devices import find_controllers, read_devices, read_disk, read_translation
from orchestrator.audit.disk import DiskState
from orchestrator.audit.edge import find_channels, list_addresses, read_taps
from orchestrator.audit.isolation_facts import read_history, read_isolation, take_first, take_last
from orchestrator.audit.network import Promised, Readings, VfReading
from orchestrator.audit.nic import Translation
from orchestrator.audit.traffic import SendCommand, find_tie, read_strays, send_frames
from orchestrator.errors import HostError, OrchestratorError
from orchestrator.host.cache import read_caches
from orchestrator.host.edge import describe_edge, read_edge_mode
from orchestrator.host.hugepages import read_ksm_run
from orchestrator.host.iommu import read_unsafe_interrupts
from orchestrator.host.irqs import read_irqs
from orchestrator.host.processes import (
    Thread,
    read_last_run,
    read_maps,
    read_services,
    survey_threads,
)
from orchestrator.host.root import HostRoot
from orchestrator.host.switch_trace import SwitchesByCpu, read_switches, sum_switches
from orchestrator.host.targets import read_connected_targets
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.cache import CachePlan
from orchestrator.model.core_start import CoreStart
from orchestrator.model.disk import DiskCheck
from orchestrator.model.edge import EdgeMode
from orchestrator.model.exits import ExitPolicy, ExitSample
from orchestrator.model.plan import NicPlan
from orchestrator.model.switch import SwitchTie
from orchestrator.model.topology import Topology
from orchestrator.model.uplink import EdgeReading, Invariant, InvariantReading, SwitchCount, Traffic, VepaReadings
from orchestrator.values import CpuSet, MacAddress, PciAddress

# The manager, then libvirt's daemons, monolithic and modular (libvirt.org/daemons.html); not all of them run.
_SERVICES = ("nohyped.service", "libvirtd.service", "virtqemud.service", "virtlogd.service", "virtlockd.service")

_Value = TypeVar("_Value")


class Hypervisor(Protocol):
    """The part of libvirt that the audit reads."""

    def read_guests(self) -> tuple[tuple[RunningGuest, ...], Mapping[str, str]]:
        """The running guests, and by name why others cannot be read."""
        ...

    def read_exits(self, uuid: UUID) -> tuple[Mapping[str, int], ...]:
        """KVM's counters per vCPU."""
        ...


@dataclass(frozen=True)
class Source:
    """The live host, and the settings to which it is compared."""

    host: HostRoot
    hypervisor: Hypervisor
    survey: Callable[[], Topology]
    send_command: SendCommand  # used only to send frames
    housekeeping: CpuSet
    exit_policy: ExitPolicy
    manager_pid: int | None = None  # None to find the manager's process by its systemd unit only
    window: float = 5.0  # seconds over which exits are counted
    # How a guest's disks were verified before it got them; None for a guest that the manager did not create.
    disk_checks: Callable[[UUID], tuple[DiskCheck, ...] | None] = lambda _: None
    # The NICs that the manager gave each of its guests, also those that do not run.
    nics: Callable[[], Mapping[UUID, tuple[NicPlan, ...]]] = dict
    # The switch port of an uplink; None if none is configured. Raises SwitchError if the switch is not registered.
    find_tie: Callable[[str], SwitchTie | None] = lambda _: None
    # Secret texts that a guest was configured with: name, hash and size of each.
    given_texts: Callable[[UUID], tuple[str, ...]] = lambda _: ()
    # The part of the caches that a guest requested; None for none. Raises NotFound for a guest that the manager did not create.
    caches: Callable[[UUID], CachePlan | None] = lambda _: None
    # What had happened on a guest's cores when it was started; None if that was not recorded.
    core_starts: Callable[[UUID], CoreStart | None] = lambda _: None


class Lazy(Generic[_Value]):
    """Reads a value at the first call; each call returns the same value or raises the same error."""

    def __init__(self, read: Callable[[], _Value]) -> None:
        self._read, self._is_read = read, False
        self._error: Exception | None = None

    def __call__(self) -> _Value:
        self.read()
        if self._error is not None:
            raise self._error
        return self._value

    def read(self) -> None:
        """Reads the value now; only a call raises its error."""
        if self._is_read:
            return
        self._is_read = True
        try:
            self._value = self._read()
        except Exception as error:
            self._error = error


class Facts:
    """The facts of one audit.

    Args:
        frames: number to send from guest to guest; 0 for none.
        host_only: the exits and cores of guests are not sampled, which only their own proofs need.

    Raises OrchestratorError if the host cannot be surveyed, or libvirt does not respond: then no proof can be measured.
    """

    def __init__(self, source: Source, frames: int, *, host_only: bool = False) -> None:
        host = source.host
        self.guests, self.unread = source.hypervisor.read_guests()
        sampled = () if host_only else self.guests
        self.topology = source.survey()
        self.housekeeping, self.exit_policy = source.housekeeping, source.exit_policy
        self.exits = {guest.name: _count_exits(source, guest) for guest in sampled}
        self._threads = Lazy(partial(survey_threads, host))
        self.threads = Lazy(lambda: self._threads()[0])
        self.unread_threads = Lazy(lambda: self._threads()[1])
        self.last_runs = Lazy(lambda: read_last_runs(host, self.guests, self.threads(), self.topology))
        self.irqs = Lazy(partial(read_irqs, host))
        self.services = Lazy(partial(read_manager_services, host, source.manager_pid))
        self.maps = {guest.name: Lazy(partial(read_maps, host, guest.pid)) for guest in self.guests}
        for maps in self.maps.values():
            maps.read()  # soon after the pools of the survey, with which they are compared
        self.ksm_run = Lazy(partial(read_ksm_run, host))
        self.confinement = {guest.name: Lazy(partial(read_confined, host, guest)) for guest in self.guests}
        self.devices = {guest.name: Lazy(partial(read_devices, host, guest)) for guest in self.guests}
        self.translation = {guest.name: Lazy(partial(self._read_translation, host, guest)) for guest in self.guests}
        self.controllers = {guest.name: Lazy(partial(find_controllers, host, guest)) for guest in self.guests}
        self.disks = {guest.name: Lazy(partial(self._read_disks, host, guest)) for guest in self.guests}
        self.disk_checks = {guest.name: Lazy(partial(source.disk_checks, guest.uuid)) for guest in self.guests}
        self.vfs = Lazy(partial(read_vfs, host, self.guests, self.topology))
        self.nics = Lazy(partial(_read_nics, source, self.guests))
        self.strays = Lazy(partial(read_strays, source, self.guests))
        self.connected_targets = Lazy(partial(read_connected_targets, host))
        self.given_texts = {guest.name: Lazy(partial(source.given_texts, guest.uuid)) for guest in self.guests}
        self.promised_caches = {guest.name: Lazy(partial(source.caches, guest.uuid)) for guest in self.guests}
        self.caches = Lazy(partial(read_caches, host))
        self.unsafe_interrupts = Lazy(partial(read_unsafe_interrupts, host))
        self.core_samples = {guest.name: self._sample_cores(source, guest) for guest in sampled}
        self._switches = Lazy(partial(self._read_switches, host))
        self.core_histories = {guest.name: Lazy(partial(self._read_history, source, guest)) for guest in self.guests}
        self.host_isolation = Lazy(lambda: read_isolation(host, self.housekeeping, self.guests, self.topology, self.threads()))
        uplinks = list_addresses(self.guests, read_taps(source.host, self.guests))
        self._balance = {uplink: _compare_counters(source, uplink, macs) for uplink, macs in uplinks.items()}
        self.vepa = Lazy(partial(self._read_vepa, source, frames))

    def other_labels(self, guest: RunningGuest) -> dict[str, str | None]:
        """Security labels of the other guests, without those that cannot be read: these have a proof of their own."""
        found: dict[str, str | None] = {}
        for name, read in self.confinement.items():
            with suppress(HostError):
                found |= {name: read().confinement.label} if name != guest.name else {}
        return found

    def _sample_cores(self, source: Source, guest: RunningGuest) -> Lazy[tuple[Sample, Sample]]:
        """As ``_count_exits``, of what runs on the guest's cores."""
        cores = read_guest_cpus(guest, self.topology)
        first = Lazy(lambda: take_first(source.host, guest, cores, self.threads()))
        first.read()
        return Lazy(lambda: (first(), take_last(source.host, guest, cores, first(), source.window)))

    def _read_switches(self, host: HostRoot) -> SwitchesByCpu:
        """After the last sample of each guest: see ``read_history``."""
        for samples in self.core_samples.values():
            samples.read()
        return read_switches(host)

    def _read_history(self, source: Source, guest: RunningGuest) -> History | str:
        cores, samples = read_guest_cpus(guest, self.topology), self.core_samples[guest.name]
        return read_history(
            source.host, guest, source.core_starts, lambda: samples()[1], lambda: sum_switches(self._switches(), cores)
        )

    def _read_disks(self, host: HostRoot, guest: RunningGuest) -> tuple[DiskState, ...]:
        if not (controllers := self.controllers[guest.name]()):
            return ()
        return tuple(read_disk(host, device) for device in self.devices[guest.name]() if device.address in controllers)

    def _read_translation(self, host: HostRoot, guest: RunningGuest) -> Translation | None:
        return read_translation(host, guest, self.maps[guest.name]())

    def _read_vepa(self, source: Source, frames: int) -> VepaReadings:
        traffic: Traffic | None = None
        gaps: tuple[str, ...] = ()
        counted: SwitchCount | str = ""
        if frames:
            for exits in self.exits.values():
                exits.read()  # before the frames, which make the guests exit
            try:
                traffic, counted = send_frames(source, self.guests, frames)
            except OrchestratorError as error:
                gaps = (error.message,)
        # Read after the traffic: this detects a PF reset in the meantime.
        edges = (*read_edges(source.host, self.guests, self.topology), *read_taps(source.host, self.guests))
        switch, gap = (None, counted) if isinstance(counted, str) else (counted, "")
        invariants = tuple(one for read in self._balance.values() for one in read(edges))
        return VepaReadings(edges, traffic, gaps, switch, gap, invariants)


def read_last_runs(
    host: HostRoot, guests: tuple[RunningGuest, ...], threads: tuple[Thread, ...], topology: Topology
) -> dict[int, float | None]:
    """For ``find_ambiguous_threads``, by thread id."""
    return {thread.tid: read_last_run(host, thread) for thread in find_ambiguous_threads(guests, threads, topology)}


def read_manager_services(host: HostRoot, manager_pid: int | None) -> dict[str, tuple[int, ...]]:
    """Process ids by service, the manager's first."""
    services = read_services(host, _SERVICES)
    if manager_pid is not None:
        services[_SERVICES[0]] = tuple(sorted({*services[_SERVICES[0]], manager_pid}))
    return services


def read_edges(host: HostRoot, guests: Iterable[RunningGuest], topology: Topology) -> tuple[EdgeReading, ...]:
    """The edge mode of each PF of which a guest has a VF. An error becomes the text of the reading."""
    used = {address for guest in guests for address in guest.hostdevs}
    edges = []
    for pf in topology.pfs:
        if not any(vf.address in used for vf in pf.vfs):
            continue
        name = pf.interface or str(pf.address)
        try:
            reading = EdgeReading(name, read_edge_mode(host, pf), describe_edge(host, pf))
            edges.append(reading if reading.mode == EdgeMode.VEPA else find_channels(host, pf, used, reading))
        except HostError as error:
            edges.append(EdgeReading(name, None, error.message))
    return tuple(edges)


def read_vfs(host: HostRoot, guests: Iterable[RunningGuest], topology: Topology) -> Readings:
    """The settings of all VFs of each PF of which a guest has a VF. An error becomes the text of the reading."""
    used = {address for guest in guests for address in guest.hostdevs}
    readings: dict[PciAddress, VfReading | str] = {}
    for pf in topology.pfs:
        if not any(vf.address in used for vf in pf.vfs):
            continue
        name, error = pf.interface or "", f"PF {pf.address} has no interface"
        try:
            states = {state.index: state for state in host.net.read_vfs(name)} if name else {}
            error = f"{name} does not report it" if name else error
        except HostError as failed:
            states, error = {}, failed.message
        for vf in pf.vfs:
            state = states.get(vf.index)
            readings[vf.address] = VfReading(name, state) if state else error
    return readings


def _count_exits(source: Source, guest: RunningGuest) -> Lazy[tuple[ExitSample, ExitSample]]:
    """Takes the first sample now, and the second at least ``window`` seconds later."""

    def sample() -> ExitSample:
        return ExitSample(time.monotonic(), source.hypervisor.read_exits(guest.uuid))

    first = Lazy(sample)
    first.read()

    def read() -> tuple[ExitSample, ExitSample]:
        before = first()
        time.sleep(max(0.0, before.time + source.window - time.monotonic()))
        return before, sample()

    return Lazy(read)


def _compare_counters(
    source: Source, uplink: str, macs: tuple[MacAddress, ...]
) -> Callable[[Iterable[EdgeReading]], tuple[InvariantReading, ...]]:
    """``macs``: of the guests. Takes the first sample of the counters now, and the second at least ``window`` seconds later."""
    tie, start = find_tie(source, uplink), time.monotonic()
    first = Lazy(partial(take_sample, source.host, uplink, tie, macs, is_start=True))
    first.read()

    def read(edges: Iterable[EdgeReading]) -> tuple[InvariantReading, ...]:
        time.sleep(max(0.0, start + source.window - time.monotonic()))
        try:
            return finish(source.host, uplink, tie, [edge for edge in edges if edge.uplink == uplink], first())
        except HostError as error:
            return (InvariantReading(Invariant.GUESTS_UPLINK, uplink, None, f"not measured: {error.message}"),)

    return read


def _read_nics(source: Source, guests: Iterable[RunningGuest]) -> Promised:
    """Of guests that do not run too: the VFs of a guest are configured before its QEMU starts."""
    known = dict(source.nics())
    running = {guest.name: known.pop(guest.uuid, None) for guest in guests}
    return {**running, **{f"not running: {uuid}": nics for uuid, nics in known.items()}}
