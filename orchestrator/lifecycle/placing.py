"""Planning a guest on the live host and claiming its place, with nobody in between."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from orchestrator.access import Identity, Role
from orchestrator.errors import Conflict, NoRoom, NotFound, QuotaExceeded, RequestError
from orchestrator.host.hugepages import read_free_pages, read_pool_size, read_pools
from orchestrator.host.pci import read_driver, read_up
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology, refresh_topology
from orchestrator.hypervisor import Hypervisor, LiveGuest
from orchestrator.images.store import find_image
from orchestrator.ledger import Claim, Ledger
from orchestrator.lifecycle.core_manager import HOST
from orchestrator.planning.plan import Claims, Plan, Policy
from orchestrator.planning.planner import hide_vf_owners, plan_guest
from orchestrator.request import GuestRequest
from orchestrator.service.watchdog import WatchedLock
from orchestrator.state import GuestState
from orchestrator.steps.vfs import VFIO
from orchestrator.topology import Topology
from orchestrator.values import CpuSet, PciAddress, Size

_BELIEVED = 10.0
"""Seconds for which a place is found on an earlier survey. Only what few events change is not seen then (CPUs that go on or off
line, hot-plugged devices): at worst the start fails, and is undone. Nothing is refused on it, but while VFs are being made."""

# States in which a guest that libvirt has may not have its pages yet.
_STARTING = (GuestState.CREATING, GuestState.STARTING, GuestState.STOPPED)


class Placing:
    """Finds guests their place.

    Args:
        shared: held while something is changed that serves all guests.
        images: folder of the built guest images.
        launched: guests whose QEMU has been started, and has all its pages; changed by others meanwhile.
    """

    def __init__(
        self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, policy: Policy,
        shared: WatchedLock, images: Path, launched: Container[UUID],
    ) -> None:  # fmt: skip
        self._host, self._hypervisor, self._ledger, self._policy = host, hypervisor, ledger, policy
        self._shared, self._images, self._launched = shared, images, launched
        # Held from reading what is free until it is claimed: two that read the same free pages would both be promised them.
        self._lock = WatchedLock()
        # The last survey, and when it was begun (time.monotonic()).
        self._known: tuple[Topology, float] | None = None

    def claim(self, who: Identity, request: GuestRequest) -> Plan:
        """Plans a guest and claims what it is to have, in one.

        Raises:
            As ``plan``; LostRace: another program has changed the ledger.
        """
        self._check(who, request)
        with self._lock:
            plan, generation = self._plan(who, request)
            plan = replace(plan, serial=generation + 1)  # no two claims are based on the same generation
            self._ledger.claim(plan, generation, request, who.tenant)
            return plan

    def plan(self, who: Identity, request: GuestRequest) -> Plan:
        """What a guest would get now.

        Raises:
            Conflict: the name is taken, or the id stands for another request.
            QuotaExceeded: the tenant may not have so much.
            RequestError, NotFound, NoRoom: see ``plan_guest`` and ``find_image``.
        """
        self._check(who, request)
        return self._plan(who, request)[0]

    def check(self, limit: float) -> None:
        """Looks whether claims go on.

        Raises:
            OrchestratorError: one has taken more than ``limit`` seconds.
        """
        self._lock.check(limit)

    def _check(self, who: Identity, request: GuestRequest) -> None:
        if request.name == HOST:
            raise RequestError(f"no guest can be named {HOST}: that is the host itself", "choose another name")
        try:
            image = find_image(self._images, request.image)
        except NotFound:
            if who.role is not Role.TENANT:
                raise
            # Not where images are kept, and not the names of other customers'.
            raise NotFound(f"there is no guest image {request.image!r}", "ask the operator of the host for its images") from None
        if request.size.bytes < image.memory.bytes:
            raise RequestError(f"{request.memory} of memory is too small for the image {image.name}", f"it needs {image.memory}")

    def _plan(self, who: Identity, request: GuestRequest) -> tuple[Plan, int]:
        """The plan, and the generation of the ledger that it is based on."""
        read = self._ledger.read()
        find_repeated(who, request, read.claims)  # again: one of another name may have come with the same id meanwhile
        _check_name(request, {claim.plan.name for claim in read.claims})
        owned = [claim.plan for claim in read.claims if claim.owner == who.tenant]
        if not request.placement:
            _check_quota(who, request, request.cores, owned)
        try:
            plan = self._find_place(request, read.claims)
        except NoRoom as error:
            if who.role is Role.TENANT:
                error = hide_vf_owners(error, request)
                error.hint = "ask the operator of the host"  # a tenant may not see the survey
            raise error from None
        if request.placement:  # only the host knows how many cores that is
            _check_quota(who, request, len(plan.cores), owned)
        return plan, read.generation

    def _find_place(self, request: GuestRequest, claims: Sequence[Claim]) -> Plan:
        """On what is known of the host; on what it is now if there is no room, or what was chosen has changed.

        Raises:
            Conflict: somebody else's guest has the name.
            RequestError, NoRoom: see ``plan_guest``.
        """
        # Before the host is surveyed: those that may have their pages. See ``Claims.of``.
        begun = {claim.plan.uuid for claim in claims if claim.state not in _STARTING or claim.plan.uuid in self._launched}
        plans, now = [claim.plan for claim in claims], time.monotonic()
        ours = frozenset(plan.uuid for plan in plans)

        def plan_on(topology: Topology, foreign: frozenset[PciAddress] = frozenset()) -> Plan:
            # After it was: the pages of one that has ended by now, with or without our knowledge, may count as free there.
            running, live = self._hypervisor.look_around(ours)
            _check_name(request, {guest.name for guest in live})
            started = frozenset(plan.name for plan in plans if plan.uuid in begun and plan.uuid in running)
            taken = _with_strangers(Claims.of(plans, started), live, topology.cpus)
            return plan_guest(request, topology, replace(taken, vfs=taken.vfs | foreign), self._policy)

        try:
            topology = self._survey(now - _BELIEVED)
            plan = plan_on(topology)
            true = self._is_true(topology, plan)
        except NoRoom:
            true = False
        if not true:
            plan = plan_on(self._survey(now))
        if read_driver(self._host, plan.vf.address) != VFIO:
            return plan
        self._known = None
        topology = self._survey(now)
        return plan_on(topology, frozenset(vf.address for pf in topology.pfs for vf in pf.vfs if vf.driver == VFIO))

    def _is_true(self, topology: Topology, plan: Plan) -> bool:
        """Whether what the plan has chosen is as the survey says: the pool as big, and the port with its link."""
        sizes = {(pool.node, pool.page_size): pool.total for pool in topology.pools}
        size = read_pool_size(self._host, plan.node, plan.page_size)
        return size == sizes[plan.node, plan.page_size] and read_up(self._host, plan.vf.pf, plan.vf.interface)

    def _survey(self, oldest: float) -> Topology:
        """The pages that are free now, and all else not older than ``oldest`` (time.monotonic()).

        Not while VFs are being made, or taken away: their PF has no carrier then. It will have it again, and the same VFs: so
        what was known before is as good, and nobody waits for it but the first.
        """
        known, then = self._known or (None, 0.0)  # once: others write it
        if known and then >= oldest and self._has_links(known):
            return replace(known, pools=read_free_pages(self._host, known.pools))
        if known and not self._shared.acquire(blocking=False):
            return replace(known, pools=read_pools(self._host))
        if not known:
            self._shared.acquire()
        try:
            began = time.monotonic()
            topology = refresh_topology(self._host, known) if known else read_topology(self._host)
            self._known = topology, began
            return topology
        finally:
            self._shared.release()

    def _has_links(self, topology: Topology) -> bool:
        """All uplinks; one without may have been seen in the moment of a reset."""
        return all(pf.up for pf in topology.pfs if pf.interface in self._policy.uplinks)


def find_repeated(who: Identity, request: GuestRequest, claims: Iterable[Claim]) -> Claim | None:
    """The guest that the same request of the same tenant has made already.

    Raises:
        Conflict: its id stands for another request.
    """
    for claim in claims:
        if request.id is not None and (claim.request.id, claim.owner) == (request.id, who.tenant):
            if claim.request == request:
                return claim
            raise Conflict(f"the id {request.id} stands for another request, that of guest {claim.plan.name}", "use a new id")
    return None


def _check_name(request: GuestRequest, taken: Container[str]) -> None:
    if request.name in taken:
        raise Conflict(f"the name {request.name} is taken", "`nohype guest list` shows your guests; choose another name")


def _check_quota(who: Identity, request: GuestRequest, cores: int, owned: list[Plan]) -> None:
    """Whether a tenant may have this, with so many cores, beside what it has."""
    cores, memory = cores + sum(len(one.cores) for one in owned), request.size.bytes + sum(one.memory.bytes for one in owned)
    quota, over, vfs = who.quota, [], len(owned) + 1
    if quota.cores is not None and cores > quota.cores:
        over.append(f"{cores} cores of {quota.cores}")
    if quota.memory is not None and memory > quota.memory.bytes:
        over.append(f"{Size(memory)} of memory of {quota.memory}")
    if quota.vfs is not None and vfs > quota.vfs:
        over.append(f"{vfs} VFs of {quota.vfs}")
    if over:
        with_it = f"with guest {request.name!r} the tenant {who.tenant} would have"
        reasons = tuple(f"{with_it} {part}" for part in over)
        raise QuotaExceeded("the quota is used up", reasons, "delete a guest, or ask the operator")


def _with_strangers(claims: Claims, live: tuple[LiveGuest, ...], cpus: CpuSet) -> Claims:
    """Adds what guests that are not ours use, as libvirt tells it; ``cpus`` are all of the host."""
    # A guest that nobody has pinned may run anywhere: it claims no core, and the audit names it.
    pins = [vcpu.pin for guest in live for vcpu in guest.vcpus if not cpus <= vcpu.pin]
    devices: frozenset[PciAddress] = frozenset(address for guest in live for address in guest.hostdevs)
    return replace(claims, cpus=CpuSet.of({*claims.cpus, *(cpu for pin in pins for cpu in pin)}), vfs=claims.vfs | devices)
