"""The proofs, one row each, in the order of the report. A proof whose facts cannot be read is `not measured`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from orchestrator.audit.cache import prove_cache_exclusive
from orchestrator.audit.confinement import prove_qemu_confined
from orchestrator.audit.core_history import add_history
from orchestrator.audit.core_quiet import prove_core_quiet
from orchestrator.audit.cores import prove_core_exclusive, prove_core_smt, prove_manager_core, read_guest_cpus
from orchestrator.audit.disk import prove_disk_clean, prove_disk_isolated
from orchestrator.audit.exits import prove_exits
from orchestrator.audit.facts import Facts
from orchestrator.audit.host_isolation import prove_host_isolation
from orchestrator.audit.isolation import prove_devices_minimal
from orchestrator.audit.memory import prove_memory_static, prove_pool_accounting
from orchestrator.audit.network import prove_network_isolated
from orchestrator.audit.nic import prove_device_isolated
from orchestrator.audit.restored import Surveys, prove_host_restored
from orchestrator.audit.uplink import prove_vepa
from orchestrator.errors import OrchestratorError
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import Measurement, Proof, Verdict, not_measured

_log = logging.getLogger(__name__)

HOST = "host"
"""Subject of proofs about the host."""


@dataclass(frozen=True)
class Row:
    """A proof of docs/promises.md."""

    name: str
    unit: str  # of the figure
    scope: ClassVar[str] = HOST

    def unmeasured(self, reason: str, subject: str = HOST) -> Proof:
        return self._state(subject, not_measured(reason))

    def _prove(self, subject: str, measure: Callable[[], Measurement]) -> Proof:
        try:
            result = measure()
        except OrchestratorError as error:
            result = not_measured(error.message)
        except Exception as error:
            # An unknown format of one kernel file must not hide the other proofs.
            _log.exception("the proof %s of %s could not be measured", self.name, subject)
            result = not_measured(f"what was read could not be parsed: {type(error).__name__}: {error}")
        return self._state(subject, result)

    def _state(self, subject: str, result: Measurement) -> Proof:
        return Proof(
            self.name, subject, result.verdict, result.figure, self.unit, result.evidence, result.readings, result.values
        )


@dataclass(frozen=True)
class HostRow(Row):
    measure: Callable[[Facts], Measurement]
    all_threads: bool = False  # a pass requires that every thread of the host could be read

    def prove(self, facts: Facts) -> Proof:
        measure = partial(self.measure, facts)
        return self._prove(HOST, partial(_with_all_threads, measure, facts) if self.all_threads else measure)


@dataclass(frozen=True)
class GuestRow(Row):
    """``all_threads`` as of ``HostRow``."""

    scope: ClassVar[str] = "guest"
    measure: Callable[[Facts, RunningGuest], Measurement]
    all_threads: bool = False

    def prove(self, facts: Facts, guest: RunningGuest) -> Proof:
        measure = partial(self.measure, facts, guest)
        return self._prove(guest.name, partial(_with_all_threads, measure, facts) if self.all_threads else measure)


@dataclass(frozen=True)
class ComparisonRow(Row):
    """Needs a survey from before the host's first guest, which a running manager does not have."""

    measure: Callable[[Surveys], Measurement]

    def prove(self, surveys: Surveys) -> Proof:
        return self._prove(HOST, partial(self.measure, surveys))


VEPA = HostRow("vepa", "misrouted frames", lambda facts: prove_vepa(facts.vepa(), None))
HOST_RESTORED = ComparisonRow("host-restored", "parts of the survey that differ", prove_host_restored)

PROOFS: tuple[HostRow | GuestRow | ComparisonRow, ...] = (
    GuestRow(
        "core-exclusive",
        "unexpected threads",
        lambda facts, guest: prove_core_exclusive(guest, facts.threads(), facts.topology, facts.last_runs(), facts.irqs()),
        all_threads=True,
    ),
    GuestRow(
        "core-smt",
        "cores shared",
        lambda facts, guest: prove_core_smt(guest, facts.guests, facts.threads(), facts.topology, facts.housekeeping),
        all_threads=True,
    ),
    HostRow(
        "manager-core",
        "threads outside housekeeping",
        lambda facts: prove_manager_core(
            facts.services(), facts.guests, facts.threads(), facts.topology, facts.housekeeping, facts.last_runs()
        ),
        all_threads=True,
    ),
    GuestRow(
        "memory-static",
        "kB violating the policy",
        lambda facts, guest: prove_memory_static(guest, facts.maps[guest.name](), facts.topology, facts.ksm_run()),
    ),
    HostRow(
        "memory-static",
        "huge pages unaccounted for",
        lambda facts: prove_pool_accounting(facts.topology.pools, {name: maps() for name, maps in facts.maps.items()}),
    ),
    GuestRow(
        "device-isolated",
        "isolation violations",
        lambda facts, guest: prove_device_isolated(
            guest,
            facts.devices[guest.name](),
            facts.translation[guest.name](),
            facts.unsafe_interrupts(),
            facts.topology.cmdline,
            iommu=bool(facts.topology.iommu_groups),
        ),
    ),
    GuestRow(
        "disk-isolated",
        "isolation violations",
        lambda facts, guest: prove_disk_isolated(guest, facts.disks[guest.name](), facts.connected_targets()),
    ),
    GuestRow(
        "disk-clean",
        "disks not verified",
        lambda facts, guest: prove_disk_clean(guest, facts.controllers[guest.name](), facts.disk_checks[guest.name]()),
    ),
    GuestRow(
        "core-quiet",
        "unexpected interruptions",
        lambda facts, guest: _prove_core_quiet(facts, guest),
        all_threads=True,
    ),
    HostRow(
        "host-isolation",
        "settings not as wanted",
        lambda facts: prove_host_isolation(*facts.host_isolation(), has_guests=bool(facts.guests)),
    ),
    GuestRow(
        "cache-exclusive",
        "limits violated",
        lambda facts, guest: prove_cache_exclusive(guest, facts.promised_caches[guest.name](), facts.caches),
    ),
    VEPA,
    GuestRow(
        "network-isolated",
        "settings violated",
        lambda facts, guest: prove_network_isolated(guest, facts.vfs(), facts.nics(), facts.strays()),
    ),
    GuestRow(
        "devices-minimal",
        "unlisted device models",
        lambda facts, guest: prove_devices_minimal(guest, facts.threads(), facts.given_texts[guest.name]()),
        all_threads=True,
    ),
    GuestRow(
        "qemu-confined",
        "ways out of the confinement",
        lambda facts, guest: prove_qemu_confined(guest, facts.confinement[guest.name](), facts.other_labels(guest)),
    ),
    GuestRow(
        "exits",
        "exits per second of the busiest vCPU",
        lambda facts, guest: prove_exits(*facts.exits[guest.name](), facts.exit_policy),
    ),
    HOST_RESTORED,
)
"""`nohype audit` measures all proofs except ``ComparisonRow``, which `nohype demo` measures."""


def _prove_core_quiet(facts: Facts, guest: RunningGuest) -> Measurement:
    vcpus, cores = frozenset(vcpu.tid for vcpu in guest.vcpus), read_guest_cpus(guest, facts.topology)
    measured = prove_core_quiet(vcpus, cores, *facts.core_samples[guest.name]())
    return add_history(measured, facts.core_histories[guest.name](), vcpus, cores, facts.threads())


def _with_all_threads(measure: Callable[[], Measurement], facts: Facts) -> Measurement:
    """A pass becomes `not measured` if a thread could not be read: it may run anywhere."""
    result, errors = measure(), facts.unread_threads()
    if not errors or result.verdict is not Verdict.PASS:
        return result
    return not_measured(f"{len(errors)} threads could not be read: {'; '.join(error.message for error in errors[:3])}")
