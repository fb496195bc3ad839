"""What somebody may ask the system manager for: who may, what is planned and claimed for it, and what is shown of it."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from orchestrator.access import Identity, Role, may_change, may_see
from orchestrator.console import READY, tell, wait_for
from orchestrator.core_manager import HOST, CoreManager
from orchestrator.errors import (
    Conflict,
    Forbidden,
    GuestError,
    LostRace,
    NotFound,
    OrchestratorError,
    QuotaExceeded,
    RequestError,
    Stale,
)
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor import Hypervisor, LiveGuest
from orchestrator.images.store import find_image
from orchestrator.ledger import Claim, Event, Ledger, Quarantined
from orchestrator.plan import Claims, Plan, Policy
from orchestrator.planner import plan_guest
from orchestrator.request import GuestRequest
from orchestrator.state import GuestState
from orchestrator.steps.vfs import VFIO
from orchestrator.supervisor import Locks, Supervisor
from orchestrator.topology import Topology
from orchestrator.values import PciAddress, Size
from orchestrator.watchdog import WatchedLock

_log = logging.getLogger(__name__)

_ATTEMPTS = 20

# States in which the pool still shows the guest's pages as free, as far as can be known.
_NOT_STARTED = (GuestState.CREATING, GuestState.STARTING, GuestState.STOPPED)


@dataclass(frozen=True)
class GuestView:
    """A guest as the manager shows it.

    Attributes:
        state: as in the ledger; ``ended`` if it should run but does not; ``planned`` if nothing is claimed for it.
        owner: the tenant it belongs to, empty for the host's own.
        version: see ``Claim``; 0 if nothing is claimed.
    """

    plan: Plan
    state: str
    request: GuestRequest
    owner: str = ""
    version: int = 0
    restarts: int = 0

    def to_json(self) -> dict[str, Any]:
        """The guest as plain JSON types; memory in bytes."""
        plan = self.plan.to_json()
        pages = plan.pop("pages")
        sizes = {"memory": self.plan.memory.bytes, "huge_pages": pages, "page_size": self.plan.page_size.bytes}
        kept = {"owner": self.owner, "version": self.version, "restart": self.request.restart, "restarts": self.restarts}
        return {**plan, "state": self.state, "cpus": list(self.plan.cpus), **sizes, **kept, "id": self.request.id}


class SystemManager:
    """Takes requests and makes guests of them. Changes of one guest come one after the other, those of several side by side.

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
        self._images = images
        # Held while something is changed that serves all guests. The watchdog looks that it is not held for ever.
        self.shared = WatchedLock()
        self._cores = CoreManager(host, hypervisor, ledger, policy, self.shared, images, consoles)
        # Held from reading what is free until it is claimed: two that read the same free pages would both be promised them.
        self._claiming = threading.Lock()
        self._known: Topology | None = None
        self.supervisor = Supervisor(self._cores, ledger)
        self._asking = Locks()
        self._happened = threading.Condition()
        self._closed = False
        ledger.on_event(self._wake)

    # What there is.

    def survey(self) -> Topology:
        """What the host has now."""
        return read_topology(self._host)

    def live_guests(self) -> tuple[LiveGuest, ...]:
        """What runs now, ours or not, as libvirt and QEMU tell it."""
        return self._hypervisor.guests()

    def guests(self, who: Identity) -> tuple[GuestView, ...]:
        """All guests that hold a claim and that ``who`` may see."""
        running = self._hypervisor.uuids()
        return tuple(_view(claim, running) for claim in self._ledger.read().claims if may_see(who, claim.owner))

    def guest(self, who: Identity, name: str) -> GuestView:
        """One guest.

        Raises:
            NotFound: no guest of this name holds a claim, or ``who`` may not see it.
        """
        return _view(self._find(who, name), self._hypervisor.uuids())

    def quarantined(self, who: Identity) -> tuple[Quarantined, ...]:
        """What could not be verified clean, for operators and viewers.

        Raises:
            Forbidden: ``who`` is a tenant.
        """
        if who.role is Role.TENANT:
            raise Forbidden("a tenant may not see the quarantine", "ask the operator of the host")
        return self._ledger.quarantined()

    def events(self, who: Identity, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """Events that ``who`` may see, with ids above ``after``, oldest first."""
        return self._ledger.events(after, limit, who.tenant if who.role is Role.TENANT else None)

    def last_event(self) -> int:
        """Id of the newest event, 0 before the first."""
        return self._ledger.last_event()

    def wait_events(self, who: Identity, after: int, timeout: float) -> tuple[Event, ...]:
        """As ``events``; waits at most ``timeout`` seconds until there are some."""
        deadline = time.monotonic() + timeout
        with self._happened:
            while not (found := self.events(who, after)) and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0 or not self._happened.wait(left):
                    break
        return found

    # What somebody asks for.

    def plan(self, who: Identity, request: GuestRequest) -> GuestView:
        """What the guest would get, without claiming it.

        Raises:
            Conflict: the name is taken.
            QuotaExceeded: the tenant may not have so much.
            RequestError, NotFound, NoRoom: see ``plan_guest`` and ``find_image``.
        """
        return GuestView(self._plan(who, request)[0], "planned", request, who.tenant)

    def create(self, who: Identity, request: GuestRequest) -> tuple[GuestView, bool]:
        """Makes a guest: plan, claim, change the host, start. On any error all of it is undone.

        Returns:
            The guest, and whether it is new: False if the same was asked for before, by the same id.

        Raises:
            Conflict: the name is taken, or the id stands for another request.
            Forbidden: ``who`` may not change anything.
            QuotaExceeded: the tenant may not have so much.
            RequestError, NotFound, NoRoom: the request can't be met.
            HostError, HypervisorError: the kernel or libvirt refused.
        """
        if not may_change(who, who.tenant):
            raise Forbidden(f"{who.name} may look, but not make guests")
        with self.supervisor.changing(request.name):
            known = self._find_repeated(who, request)
            if known:
                return _view(known, self._hypervisor.uuids()), False
            began = time.monotonic()
            try:
                plan = self._claim(who, request)
            except OrchestratorError as error:
                took = time.monotonic() - began
                self._ledger.log("refused", request.name, error.message, who=who.name, tenant=who.tenant, took=took)
                raise
            what = f"CPUs {plan.cpus}, {plan.pages} pages of {plan.page_size} on node {plan.node}, VF {plan.vf.address}"
            self._ledger.log("claimed", plan.name, what, who=who.name, tenant=who.tenant, took=time.monotonic() - began)
            claim = self.supervisor.start(self._find(who, plan.name), who.name)
            return _view(claim, frozenset({plan.uuid})), True

    def start(self, who: Identity, name: str, expected: int | None = None) -> GuestView:
        """Starts a guest that is stopped, on the cores, pages and VF that it has claimed. One that runs already is fine.

        Args:
            expected: the version of the guest that the caller has seen, or None for any.

        Raises:
            NotFound: no such guest, or ``who`` may not see it.
            Forbidden: ``who`` may not change it.
            Stale: it is of another version.
            Conflict: its state does not allow it.
            HostError, HypervisorError: the kernel or libvirt refused; what was done is undone.
        """
        with self._change(who, name, expected) as claim:
            if claim.state != GuestState.RUNNING:
                claim = self._ledger.set_state(name, GuestState.STARTING, restarts=0)
                claim = self.supervisor.start(claim, who.name)
            return _view(claim, frozenset({claim.plan.uuid}))

    def stop(self, who: Identity, name: str, timeout: float, expected: int | None = None) -> GuestView:
        """Asks a guest to power off, and ends it if it has not after ``timeout`` seconds. Its claim is kept.

        Raises:
            As ``start``.
        """
        with self._change(who, name, expected) as claim:
            if claim.state == GuestState.STOPPED:
                self.supervisor.cancel_restart(name)
                return _view(claim, frozenset())
            return _view(self.supervisor.stop(claim, who.name, timeout), frozenset())

    def kill(self, who: Identity, name: str, expected: int | None = None) -> GuestView:
        """Ends a guest at once, as pulling the plug does, even one that is just being stopped. Its claim is kept.

        Raises:
            As ``start``.
        """
        self._hurry(who, name, expected)
        return self.stop(who, name, 0, expected)

    def restart(self, who: Identity, name: str, timeout: float, expected: int | None = None) -> GuestView:
        """As ``stop``, then ``start``, with nobody in between."""
        with self._change(who, name, expected):
            self.stop(who, name, timeout)
            return self.start(who, name)

    def delete(self, who: Identity, name: str, expected: int | None = None) -> None:
        """Ends a guest at once if it runs, and gives back all that it had, its claim included. Raises as ``start``."""
        self._hurry(who, name, expected)
        with self._change(who, name, expected) as claim:
            if claim.state == GuestState.QUARANTINED:
                raise Conflict(f"guest {name} is in quarantine", "an operator can clear it: nohype quarantine clear")
            self._ledger.set_state(name, GuestState.DELETING)
            self.supervisor.delete(claim, "deleted", "on request", who.name)

    def clear_quarantine(self, who: Identity, name: str, *, force: bool = False) -> None:
        """Tries once more to clean what a guest had, and gives it free.

        Args:
            force: give it free even if it is still not clean, since the operator has seen to it.

        Raises:
            Forbidden: ``who`` is no operator.
            NotFound: no such guest is in quarantine.
            Conflict: it is still not clean; with the reasons.
        """
        if who.role is not Role.OPERATOR:
            raise Forbidden(f"{who.name} is no operator, and may not clear the quarantine")
        with self.supervisor.changing(name):
            claim = self._ledger.find(name)
            if not claim or claim.state != GuestState.QUARANTINED:
                raise NotFound(f"no guest {name} is in quarantine", "`nohype quarantine list` shows what is")
            claim = self._ledger.set_state(name, GuestState.DELETING)
            if force:
                self._cores.clean(claim.plan)
                self._cores.forget(claim.plan)
                self.supervisor.release(claim, "cleared", "by force", who.name)
            elif findings := self.supervisor.delete(claim, "cleared", "clean now", who.name):
                raise Conflict(f"{name} is still not clean: {'; '.join(findings)}", "see to it, then clear it with --force")

    def wait_ready(self, who: Identity, name: str, timeout: float) -> str:
        """Waits for the guest's own word that it is ready; returns that line. See ``console.wait_for``."""
        uuid = self._find(who, name).plan.uuid
        log = self._cores.console_log(name)
        return wait_for(log, READY, timeout=timeout, alive=lambda: uuid in self._hypervisor.uuids()).splitlines()[-1]

    def tell(self, who: Identity, name: str, line: str, timeout: float) -> str:
        """Types a line on the guest's console and returns its answer. See ``console.tell``.

        Raises:
            NotFound: no such guest runs, or ``who`` may not see it.
            Forbidden: ``who`` may only look.
        """
        claim = self._find(who, name)
        self._check_change(who, claim)
        console = self._hypervisor.guest(name).console
        if console is None:
            raise GuestError(f"guest {name} has no serial console")
        # One question at a time: answers do not say which line they answer.
        with self._asking(name):
            return tell(console, self._cores.console_log(name), line, timeout=timeout)

    def close(self) -> None:
        """Starts nothing any more, and lets those go who wait for events. Guests go on."""
        self._closed = True
        self.supervisor.close()
        with self._happened:
            self._happened.notify_all()

    # How.

    def _find(self, who: Identity, name: str) -> Claim:
        claim = self._ledger.find(name)
        if not claim or not may_see(who, claim.owner):
            raise NotFound(f"there is no guest named {name}", "`nohype guest list` shows all")
        return claim

    def _check_change(self, who: Identity, claim: Claim) -> None:
        if not may_change(who, claim.owner):
            raise Forbidden(f"{who.name} may look at guest {claim.plan.name}, but not change it")

    def _hurry(self, who: Identity, name: str, expected: int | None) -> None:
        """Cuts short the time that a guest which is being stopped has for its power-off: whoever waits for it has the lock."""
        claim = self._find(who, name)
        self._check_change(who, claim)
        if claim.state == GuestState.STOPPING and expected in (None, claim.version):
            self._hypervisor.destroy(claim.plan.uuid)

    @contextmanager
    def _change(self, who: Identity, name: str, expected: int | None) -> Iterator[Claim]:
        """The guest, with nobody else changing it."""
        self._check_change(who, self._find(who, name))
        with self.supervisor.changing(name):
            claim = self._find(who, name)
            if expected is not None and expected != claim.version:
                raise Stale(f"guest {name} has changed: it is version {claim.version}, not {expected}", "look at it again")
            yield claim

    def _find_repeated(self, who: Identity, request: GuestRequest) -> Claim | None:
        """The guest that the same request has made already."""
        if request.id is None:
            return None
        for claim in self._ledger.read().claims:
            if (claim.request.id, claim.owner) == (request.id, who.tenant):
                if claim.request == request:
                    return claim
                raise Conflict(f"the id {request.id} stands for another request, that of guest {claim.plan.name}", "use a new id")
        return None

    def _claim(self, who: Identity, request: GuestRequest) -> Plan:
        with self._claiming:
            for attempt in range(_ATTEMPTS):
                plan, generation = self._plan(who, request)
                try:
                    self._ledger.claim(plan, generation, request, who.tenant)
                except LostRace:
                    # A guest was deleted meanwhile: there is more room than was seen.
                    if attempt == _ATTEMPTS - 1:
                        raise
                else:
                    return plan
        raise AssertionError("not reached")

    def _plan(self, who: Identity, request: GuestRequest) -> tuple[Plan, int]:
        if request.name == HOST:
            raise RequestError(f"no guest can be named {HOST}: that is the host itself", "choose another name")
        image = find_image(self._images, request.image)
        if request.size.bytes < image.memory.bytes:
            raise RequestError(f"{request.memory} of memory is too small for the image {image.name}", f"it needs {image.memory}")
        read = self._ledger.read()
        if request.name in {claim.plan.name for claim in read.claims} | self._hypervisor.names():
            raise Conflict(f"the name {request.name} is taken", "`nohype guest list` shows your guests; choose another name")
        # Read before the host is surveyed: see ``Claims.of``.
        started = frozenset(claim.plan.name for claim in read.claims if claim.state not in _NOT_STARTED)
        live = self._hypervisor.guests(frozenset(claim.plan.uuid for claim in read.claims))
        with self.shared:  # not while VFs are being made or taken away: their PF has no carrier then
            topology = self._known = read_topology(self._host, self._known)
        taken = _with_strangers(Claims.of([claim.plan for claim in read.claims], started), live, topology)
        plan = plan_guest(request, topology, taken, self._policy)
        _check_quota(who, plan, [claim.plan for claim in read.claims if claim.owner == who.tenant])
        return plan, read.generation

    def _wake(self, event: Event) -> None:
        _log.info("%s %s: %s", event.subject, event.kind, event.detail, extra={"event": event})
        with self._happened:
            self._happened.notify_all()


def _view(claim: Claim, running: frozenset[UUID]) -> GuestView:
    ended = claim.state == GuestState.RUNNING and claim.plan.uuid not in running
    state = "ended" if ended else str(claim.state)
    return GuestView(claim.plan, state, claim.request, claim.owner, claim.version, claim.restarts)


def _check_quota(who: Identity, plan: Plan, owned: list[Plan]) -> None:
    """Whether a tenant may have this beside what it has."""
    plans = [*owned, plan]
    cores, memory = sum(len(one.cores) for one in plans), sum(one.memory.bytes for one in plans)
    quota, over = who.quota, []
    if quota.cores is not None and cores > quota.cores:
        over.append(f"{cores} cores of {quota.cores}")
    if quota.memory is not None and memory > quota.memory.bytes:
        over.append(f"{Size(memory)} of memory of {quota.memory}")
    if quota.vfs is not None and len(plans) > quota.vfs:
        over.append(f"{len(plans)} VFs of {quota.vfs}")
    if over:
        with_it = f"with guest {plan.name!r} the tenant {who.tenant} would have"
        reasons = tuple(f"{with_it} {part}" for part in over)
        raise QuotaExceeded("the quota is used up", reasons, "delete a guest, or ask the operator")


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
