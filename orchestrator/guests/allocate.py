"""Planning a guest on the live host and claiming its place, with nobody in between."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from orchestrator.errors import Conflict, HostError, NoRoom, NotFound, QuotaExceeded, RequestError
from orchestrator.guests.host_setup import HOST
from orchestrator.guests.host_warnings import HOST_TOPIC, HostWarnings
from orchestrator.guests.unmanaged_use import add_unmanaged
from orchestrator.guests.vf_making import VfsNeeded, check_made, plan_known
from orchestrator.host.cpus import read_online
from orchestrator.host.hugepages import read_free_pages, read_pool_size, survey_pools, survey_promised_pages
from orchestrator.host.pci import VFIO, read_driver
from orchestrator.host.ports import read_up
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import find_vf, read_use
from orchestrator.host.survey import read_topology, refresh_topology
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.images.store import find_image
from orchestrator.ledger import Claim, Ledger
from orchestrator.locks import WatchedLock
from orchestrator.model.access import Identity, Role
from orchestrator.model.plan import Claims, ImageRef, NicPlan, Plan, Policy
from orchestrator.model.request import GuestRequest
from orchestrator.model.state import GuestState
from orchestrator.model.topology import PagePool, Topology
from orchestrator.planning.host_check import HostFinding, check_host
from orchestrator.planning.last_choices import list_last_choices
from orchestrator.planning.planner import hide_vf_owners
from orchestrator.values import CpuSet, PciAddress, Size

_BELIEVED = 10.0
"""Seconds for which a place is found on an earlier survey. Only what few events change is not seen then (CPUs that come on line,
hot-plugged devices): at worst the start fails, and is undone. Nothing is refused on it, but while VFs are being made."""

_BEING_STARTED = (GuestState.CREATING, GuestState.STARTING)
# States in which a guest that libvirt has may not have its pages yet.
_STARTING = (*_BEING_STARTED, GuestState.STOPPED)


class Placed(NamedTuple):
    """A plan, and what an operator should know of it and of the host, a sentence each.

    Attributes:
        last_choices: what of the plan others may use later.
        problems: what could not be read of unmanaged domains.
        findings: differences between configuration and host.
    """

    plan: Plan
    last_choices: tuple[str, ...]
    problems: tuple[str, ...]
    findings: tuple[HostFinding, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """All of it."""
        return (*self.last_choices, *self.problems, *(finding.text for finding in self.findings))


class Placing:
    """Finds guests their place.

    Args:
        shared: held while something is changed that serves all guests.
        images: folder of the built guest images.
        launched: guests whose QEMU has been started, and has all its pages; changed by others meanwhile.
        warnings: gets what claims had to take as a last choice.
    """

    def __init__(
        self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, policy: Policy,
        shared: WatchedLock, images: Path, launched: Container[UUID], warnings: HostWarnings,
    ) -> None:  # fmt: skip
        self._host, self._hypervisor, self._ledger, self._policy = host, hypervisor, ledger, policy
        self._shared, self._images, self._launched, self._warnings = shared, images, launched, warnings
        # Held from reading what is free until it is claimed: two that read the same free pages would both be promised them.
        self._lock = WatchedLock()
        # The last survey, and when it was begun (time.monotonic()).
        self._known: tuple[Topology, float] | None = None

    def claim(self, who: Identity, request: GuestRequest) -> Plan:
        """Plans a guest and claims what it is to have, in one.

        Raises:
            As ``plan``; LostRace: another program has changed the ledger; VfsNeeded: the planned VF is not made yet.
        """
        image = self._check(who, request)
        with self._lock:
            placed, generation = self._plan(who, request)
            check_made(self._host, placed.plan)
            plan = placed.plan.claimed(generation + 1, image)  # no two claims are based on the same generation
            self._ledger.claim(plan, generation, request, who.tenant)
        self._warnings.report(HOST_TOPIC, tuple(finding.text for finding in placed.findings))
        self._warnings.report("unmanaged domains", placed.problems)
        self._warnings.note(plan.name, placed.last_choices)
        return plan

    def plan(self, who: Identity, request: GuestRequest) -> Placed:
        """What a guest would get now.

        Raises:
            Conflict: the name is taken, or the id stands for another request.
            QuotaExceeded: the tenant may not have so much.
            VfsNeeded: there is room, but an uplink does not tell yet where its VFs will be.
            RequestError, NotFound, NoRoom: see ``plan_guest`` and ``find_image``.
        """
        self._check(who, request)
        return self._plan(who, request)[0]

    def check(self, limit: float) -> None:
        """Looks whether claims go on.

        Raises:
            OrchestratorError: one has taken more than ``limit`` seconds.
        """
        self._lock.raise_if_held_longer(limit)

    def _check(self, who: Identity, request: GuestRequest) -> ImageRef:
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
        return ImageRef(image.name, image.hash)

    def _plan(self, who: Identity, request: GuestRequest) -> tuple[Placed, int]:
        """The plan, and the generation of the ledger that it is based on."""
        read = self._ledger.read()
        find_repeated(who, request, read.claims)  # again: one of another name may have come with the same id meanwhile
        _check_name(request, {claim.plan.name for claim in read.claims})
        owned = [claim.plan for claim in read.claims if claim.owner == who.tenant]
        if not request.placement:
            _check_quota(who, request, request.cores, owned)
        try:
            placed = self._find_place(request, read.claims, named=who.role is not Role.TENANT)
        except NoRoom as error:
            if who.role is Role.TENANT:
                error = hide_vf_owners(error, request)
                error.hint = "ask the operator of the host"  # a tenant may not see the survey
            raise error from None
        if request.placement:  # only the host knows how many cores that is
            _check_quota(who, request, len(placed.plan.cores), owned)
        return placed, read.generation

    def _find_place(self, request: GuestRequest, claims: Sequence[Claim], *, named: bool) -> Placed:
        """On what is known of the host; on what it is now if there is no room, or what was chosen has changed.

        Args:
            named: whether unmanaged domains may be named.

        Raises:
            Conflict: an unmanaged domain has the name.
            VfsNeeded, RequestError, NoRoom: see ``plan_known``.
        """
        # Before the host is surveyed: those that may have their pages. See ``Claims.of``.
        begun = {claim.plan.uuid for claim in claims if claim.state not in _STARTING or claim.plan.uuid in self._launched}
        starting = frozenset(claim.plan.name for claim in claims if claim.state in _BEING_STARTED)
        plans, now = [claim.plan for claim in claims], time.monotonic()
        ours = frozenset(plan.uuid for plan in plans)

        def plan_on(topology: Topology, foreign: frozenset[PciAddress] = frozenset()) -> Placed:
            # After it was: the pages of one that has ended by now, with or without our knowledge, may count as free there.
            running, domains = self._hypervisor.list_running(ours)
            _check_name(request, {domain.name for domain in domains})
            started = frozenset(plan.name for plan in plans if plan.uuid in begun and plan.uuid in running)
            claimed = Claims.of(plans, started, starting)
            taken, problems = add_unmanaged(self._host, claimed, domains, topology, self._policy.housekeeping, named=named)
            plan = plan_known(request, topology, replace(taken, vfs=taken.vfs | foreign), self._policy)
            last_choices = list_last_choices(plan, taken.last_cpus, taken.last_vfs)
            return Placed(plan, last_choices, problems, check_host(self._policy, topology))

        try:
            topology = self._survey(now - _BELIEVED)
            placed = plan_on(topology)
            true = self._is_true(topology, placed.plan)
        except (NoRoom, VfsNeeded):
            true = False
        if not true:
            topology = self._survey(now)
            placed = plan_on(topology)
        if all(self._is_free(nic, topology) for nic in placed.plan.nics):
            return placed
        self._known = None
        topology = self._survey(now)
        return plan_on(topology, frozenset(vf.address for pf in topology.pfs for vf in pf.vfs if vf.driver == VFIO))

    def _is_true(self, topology: Topology, plan: Plan) -> bool:
        """Whether what the plan has chosen is as the survey says: the CPUs online, the pool as big, the port with its link."""
        sizes = {(pool.node, pool.page_size): pool.total for pool in topology.pools}
        try:
            size = read_pool_size(self._host, plan.node, plan.page_size)
        except HostError:
            return False  # it is gone since, or cannot be read: the next survey names it
        online = CpuSet.of(plan.cpus) <= read_online(self._host)
        up = all(read_up(self._host, pf, interface) for pf, interface in {(nic.pf, nic.interface) for nic in plan.nics})
        return online and size == sizes[plan.node, plan.page_size] and up

    def _is_free(self, nic: NicPlan, topology: Topology) -> bool:
        """Whether the VF that the plan has chosen is as the survey says, and neither handed over nor used by the host."""
        found = find_vf(self._host, nic.pf, nic.index)
        surveyed = any(vf.address == nic.address for pf in topology.pfs if pf.address == nic.pf for vf in pf.vfs)
        if found is None or not surveyed:
            return found is None and not surveyed  # it has yet to be made
        taken = read_driver(self._host, found) == VFIO or read_use(self._host, found)
        return found == nic.address and not taken

    def _survey(self, oldest: float) -> Topology:
        """The pages that are free now, and all else not older than ``oldest`` (time.monotonic()).

        Not while VFs are being made, or taken away: their PF has no carrier then. It will have it again, and the same VFs: so
        what was known before is as good, and nobody waits for it but the first.
        """
        known, then = self._known or (None, 0.0)  # once: others write it
        if known and then >= oldest and self._has_links(known):
            return self._with_pools(known, read_free_pages(self._host, known.pools))
        if known and not self._shared.acquire(blocking=False):
            return self._with_pools(known, survey_pools(self._host)[0])
        if not known:
            self._shared.acquire()
        try:
            began = time.monotonic()
            topology = refresh_topology(self._host, known) if known else read_topology(self._host)
            self._known = topology, began
            return topology
        finally:
            self._shared.release()

    def _with_pools(self, known: Topology, pools: tuple[PagePool, ...]) -> Topology:
        sizes = (pool.page_size for pool in pools if pool.total)
        return replace(known, pools=pools, promised=survey_promised_pages(self._host, sizes)[0])

    def _has_links(self, topology: Topology) -> bool:
        """All uplinks; one without may have been seen in the moment of a reset."""
        return all(pf.up for uplink in self._policy.uplinks if (pf := topology.find_uplink(uplink)))


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
        hint = "`nohype guest list` and, on the host, `virsh list --all` show the names; choose another name"
        raise Conflict(f"the name {request.name} is taken", hint)


def _check_quota(who: Identity, request: GuestRequest, cores: int, owned: list[Plan]) -> None:
    """Whether a tenant may have this, with so many cores, beside what it has."""
    cores, memory = cores + sum(len(one.cores) for one in owned), request.size.bytes + sum(one.memory.bytes for one in owned)
    quota, over, vfs = who.quota, [], sum(len(one.nics) for one in owned) + len(request.wanted_nics)
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
