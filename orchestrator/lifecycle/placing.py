"""Planning a guest on the live host and claiming its place, with nobody in between."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import AbstractContextManager
from pathlib import Path

from orchestrator.access import Identity
from orchestrator.errors import Conflict, LostRace, QuotaExceeded, RequestError
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor import Hypervisor, LiveGuest
from orchestrator.images.store import find_image
from orchestrator.ledger import Ledger
from orchestrator.lifecycle.core_manager import HOST
from orchestrator.planning.plan import Claims, Plan, Policy
from orchestrator.planning.planner import plan_guest
from orchestrator.request import GuestRequest
from orchestrator.state import GuestState
from orchestrator.steps.vfs import VFIO
from orchestrator.topology import Topology
from orchestrator.values import PciAddress, Size

_ATTEMPTS = 20

# States in which the pool still shows the guest's pages as free, as far as can be known.
_NOT_STARTED = (GuestState.CREATING, GuestState.STARTING, GuestState.STOPPED)


class Placing:
    """Finds guests their place.

    Args:
        shared: held while something is changed that serves all guests.
        images: folder of the built guest images.
    """

    def __init__(
        self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, policy: Policy,
        shared: AbstractContextManager[object], images: Path,
    ) -> None:  # fmt: skip
        self._host, self._hypervisor, self._ledger, self._policy = host, hypervisor, ledger, policy
        self._shared, self._images = shared, images
        # Held from reading what is free until it is claimed: two that read the same free pages would both be promised them.
        self._lock = threading.Lock()
        self._known: Topology | None = None

    def claim(self, who: Identity, request: GuestRequest) -> Plan:
        """Plans a guest and claims what it is to have, in one.

        Raises:
            As ``plan``.
        """
        with self._lock:
            for attempt in range(_ATTEMPTS):
                plan, generation = self.plan(who, request)
                try:
                    self._ledger.claim(plan, generation, request, who.tenant)
                except LostRace:
                    # A guest was deleted meanwhile: there is more room than was seen.
                    if attempt == _ATTEMPTS - 1:
                        raise
                else:
                    return plan
        raise AssertionError("not reached")

    def plan(self, who: Identity, request: GuestRequest) -> tuple[Plan, int]:
        """What a guest would get, and the generation of the ledger that this is based on.

        Raises:
            Conflict: the name is taken.
            QuotaExceeded: the tenant may not have so much.
            RequestError, NotFound, NoRoom: see ``plan_guest`` and ``find_image``.
        """
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
        with self._shared:  # not while VFs are being made or taken away: their PF has no carrier then
            topology = self._known = read_topology(self._host, self._known)
        taken = _with_strangers(Claims.of([claim.plan for claim in read.claims], started), live, topology)
        plan = plan_guest(request, topology, taken, self._policy)
        _check_quota(who, plan, [claim.plan for claim in read.claims if claim.owner == who.tenant])
        return plan, read.generation


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
