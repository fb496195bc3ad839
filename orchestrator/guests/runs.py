"""The threads of running guests, which libvirt is asked for once per run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from orchestrator.errors import HostError, HypervisorError, NotFound
from orchestrator.host.processes import read_process_threads
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Claim

PATIENCE = 3.0
"""Seconds for which a QEMU that does not respond may delay the other guests."""

_Result = TypeVar("_Result")

RunKey = tuple[UUID, int]
"""Id and version of a claim: each run of a guest has another version."""


@dataclass(frozen=True)
class Run:
    """``pid``: of QEMU. ``tids``: of the vCPUs, in their order. ``started``: when those were created, in seconds since boot."""

    pid: int
    tids: tuple[int, ...]
    started: float


class Runs:
    """For one thread at a time, except for ``peek``."""

    def __init__(self, host: HostRoot, hypervisor: Hypervisor) -> None:
        self._host, self._hypervisor = host, hypervisor
        self._known: dict[RunKey, Run] = {}
        self._asked: dict[RunKey, Future[Run | None]] = {}

    def keep(self, claims: Iterable[Claim]) -> None:
        """Forgets all other runs."""
        keys = set(map(run_key, claims))
        self._known = {key: run for key, run in self._known.items() if key in keys}
        self._asked = {key: reading for key, reading in self._asked.items() if key in keys}

    def find(self, claim: Claim) -> Run | None:
        """None while it cannot be read, as that of a guest that is ending, or whose QEMU does not respond."""
        key = run_key(claim)
        if key not in self._known:
            seconds = 0.0 if key in self._asked else PATIENCE
            reading = self._asked.pop(key, None) or call_aside(lambda: self._read(claim))
            if not wait([reading], seconds).done:
                self._asked[key] = reading
            elif run := reading.result():
                self._known[key] = run
        return self._known.get(key)

    def peek(self, claim: Claim) -> Run | None:
        """What ``find`` has found before: QEMU is not asked."""
        return self._known.get(run_key(claim))

    def _read(self, claim: Claim) -> Run | None:
        try:
            guest = self._hypervisor.read_guest(claim.plan.uuid)
            tids = tuple(vcpu.tid for vcpu in guest.vcpus)
            started = [thread.started for thread in read_process_threads(self._host, guest.pid) if thread.tid in tids]
        except (NotFound, HypervisorError, HostError):
            return None
        return Run(guest.pid, tids, min(started)) if started else None


def run_key(claim: Claim) -> RunKey:
    return claim.plan.uuid, claim.version


def call_aside(call: Callable[[], _Result]) -> Future[_Result]:
    """In a thread of its own: libvirt waits for a QEMU that does not respond without a limit."""
    done: Future[_Result] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=work, name="ask-guest", daemon=True).start()
    return done
