"""The threads of running guests, which libvirt is asked for once per run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from orchestrator.errors import HostError, HypervisorError, NotFound
from orchestrator.host.processes import read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Claim

RunKey = tuple[UUID, int]
"""Id and version of a claim: each run of a guest has another version."""


@dataclass(frozen=True)
class Run:
    """``tids``: of the vCPUs, in their order. ``started``: when they were created, in seconds after the host's boot."""

    tids: tuple[int, ...]
    started: float


class Runs:
    """For one thread."""

    def __init__(self, host: HostRoot, hypervisor: Hypervisor) -> None:
        self._host, self._hypervisor = host, hypervisor
        self._known: dict[RunKey, Run] = {}

    def keep(self, claims: Iterable[Claim]) -> None:
        """Forgets all other runs."""
        keys = set(map(run_key, claims))
        self._known = {key: run for key, run in self._known.items() if key in keys}

    def find(self, claim: Claim) -> Run | None:
        """None while it cannot be read, as that of a guest that is ending."""
        key = run_key(claim)
        if key not in self._known:
            try:
                guest = self._hypervisor.read_guest(claim.plan.uuid)
                tids = tuple(vcpu.tid for vcpu in guest.vcpus)
                started = [thread.started for thread in read_process_threads(self._host, guest.pid) if thread.tid in tids]
            except (NotFound, HypervisorError, HostError):
                return None
            if not started:
                return None
            self._known[key] = Run(tids, min(started))
        return self._known[key]


def run_key(claim: Claim) -> RunKey:
    return claim.plan.uuid, claim.version
