"""Plans a guest on the live host and claims the plan, as one operation."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from orchestrator.errors import Conflict, HostError, NoRoom, NotFound, OrchestratorError, RequestError
from orchestrator.guests.host_setup import HOST
from orchestrator.guests.host_warnings import HOST_TOPIC, HostWarnings
from orchestrator.guests.outcome import log_errors
from orchestrator.guests.secrets import GuestSecrets
from orchestrator.guests.survey_cache import SurveyCache
from orchestrator.guests.unmanaged_use import add_unmanaged
from orchestrator.guests.uplinks import Uplinks
from orchestrator.guests.vf_creation import VfsNeeded, check_created, plan_known
from orchestrator.host.cache import read_caches
from orchestrator.host.lvm import read_group
from orchestrator.host.machine_id import read_host_id
from orchestrator.host.nvme import read_controllers
from orchestrator.host.pci import VFIO
from orchestrator.host.root import HostRoot
from orchestrator.host.survey import read_disk_use
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.images.configuration import check_configurable
from orchestrator.images.network_root import check_network_root
from orchestrator.images.store import Image, find_image, image_names
from orchestrator.images.store_lock import keeping_builds
from orchestrator.ledger import Claim, ClaimSnapshot, Ledger, PendingClaim
from orchestrator.locks import CallQueue, WatchedLock
from orchestrator.model.access import Identity, Role
from orchestrator.model.cache import CacheSurvey
from orchestrator.model.exit_policy import VcpuClass, classify_vcpus
from orchestrator.model.plan import ImageRef, Plan, Policy
from orchestrator.model.request import DiskKind, GuestRequest
from orchestrator.model.state import GuestState
from orchestrator.model.topology import NvmeController, Topology, VolumeGroup
from orchestrator.planning.allocation_index import AllocationIndex
from orchestrator.planning.host_check import check_host
from orchestrator.planning.inputs import Site
from orchestrator.planning.last_choices import list_last_choices
from orchestrator.planning.network import find_network
from orchestrator.planning.planner import hide_device_owners
from orchestrator.planning.quota import check_quota, check_secrets
from orchestrator.planning.uplink import explain_edges
from orchestrator.values import PciAddress, Size

SURVEY_MAX_AGE = 10.0
"""Seconds. A plan on an outdated survey (CPUs that went offline, hot-plugged devices) makes the start fail, which is undone. No
request is refused on a cached survey, except while VFs are being created."""

_BEING_STARTED = (GuestState.CREATING, GuestState.STARTING)
# States in which a guest that libvirt runs may not have its pages yet.
_MAY_LACK_PAGES = (*_BEING_STARTED, GuestState.STOPPED)


class Placed(NamedTuple):
    """A plan with its warnings for operators, one sentence each.

    Attributes:
        last_choices: parts of the plan that unmanaged domains may use later.
        problems: unmanaged domains that could not be read.
        topology: the survey that the plan was made on.
    """

    plan: Plan
    last_choices: tuple[str, ...]
    problems: tuple[str, ...]
    topology: Topology

    def list_warnings(self, policy: Policy) -> tuple[str, ...]:
        edges = explain_edges(self.plan, self.topology, policy)
        return (*edges, *self.last_choices, *self.problems, *(finding.text for finding in check_host(policy, self.topology)))


class _Devices(NamedTuple):
    """What the guest of one request can get, as it was read for it."""

    controllers: tuple[NvmeController, ...]  # with their uses
    group: VolumeGroup | None  # None for a request without emulated disks
    caches: CacheSurvey | None  # None for a request that limits none


class Allocator:
    """Plans and claims.

    Args:
        shared: lock that is held while resources of all guests change.
        launched: guests whose QEMU has all its pages; changes in other threads.
        warnings: receives the last choices of claims.

    Attributes:
        lock: runs one claim at a time, from the survey until the claim is written: two claims could otherwise get the same free
            pages. The claim goes to the disk after that.
    """

    def __init__(
        self, host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, uplinks: Uplinks,
        shared: WatchedLock, images: Path, launched: Container[UUID], warnings: HostWarnings,
        secrets: GuestSecrets,
    ) -> None:  # fmt: skip
        self._host, self._hypervisor, self._ledger, self._uplinks = host, hypervisor, ledger, uplinks
        self._images, self._launched, self._warnings, self._secrets = images, launched, warnings, secrets
        self.surveys = SurveyCache(host, uplinks.policy.uplinks, shared)
        self.lock = CallQueue()
        self._index, self._examining = AllocationIndex(), threading.Lock()
        self._compared: tuple[tuple[Topology, Policy] | None, tuple[str, ...]] = None, ()
        self._host_id = read_host_id(host)

    def claim(self, caller: Identity, request: GuestRequest) -> Claim:
        """Plans a guest and claims the plan; returns when the claim is on the disk.

        Raises LostRace if another program has changed the ledger, VfsNeeded if the planned VF does not exist yet; and as `plan`.
        """
        devices = self._read_devices(request)
        with keeping_builds(self._images):  # until other programs can read the claim
            image = self._check(caller, request)
            self.surveys.renew(SURVEY_MAX_AGE)
            placed, pending = self.lock.run(lambda: self._begin_claim(caller, request, image, devices))
            claim = self._finish_claim(pending, request)
        self._warnings.report(HOST_TOPIC, self._compare(placed.topology))
        self._warnings.report("unmanaged domains", placed.problems)
        self._warnings.note(claim.plan.name, placed.last_choices)
        return claim

    def _compare(self, topology: Topology) -> tuple[str, ...]:
        """The findings of `check_host`, which does not read the number of free pages."""
        lasting = replace(topology, pools=tuple(replace(pool, free=0) for pool in topology.pools), promised=())
        given = lasting, self._uplinks.policy
        compared, findings = self._compared  # read once: other threads write it
        if given != compared:
            findings = tuple(finding.text for finding in check_host(given[1], topology))
            self._compared = given, findings
        return findings

    def _begin_claim(
        self, caller: Identity, request: GuestRequest, image: Image, devices: _Devices
    ) -> tuple[Placed, PendingClaim]:
        reading = self._ledger.read()
        placed = self._plan(caller, request, image, reading, devices)
        check_created(self._host, placed.plan)
        # No two claims are based on the same generation.
        plan = placed.plan.claimed(reading.generation + 1, ImageRef(image.name, image.hash))
        stored = request.without_secret_texts()
        return placed, self._ledger.begin_claim(plan, reading.generation, stored, caller.tenant, caller.name)

    def plan(self, caller: Identity, request: GuestRequest) -> Placed:
        """Raises VfsNeeded if the guest has room once an uplink's VFs are created."""
        _check_reserved(request)
        image = None if self._is_to_download(request) else self._check(caller, request)
        return self._plan(caller, request, image, self._ledger.read(), self._read_devices(request))

    def _is_to_download(self, request: GuestRequest) -> bool:
        """Whether the guest boots files that are downloaded when it is created."""
        return request.boot is not None and request.image not in image_names(self._images)

    def _read_devices(self, request: GuestRequest) -> _Devices:
        """Without the lock: it takes seconds. What has changed meanwhile is found before the first write to a disk."""
        kinds, name = {disk.kind for disk in request.disks}, self._uplinks.policy.disk_group
        group = read_group(self._host, name) if name and DiskKind.EMULATED in kinds else None
        controllers = self.read_disk_use(read_controllers(self._host)) if DiskKind.NVME in kinds else ()
        return _Devices(controllers, group, read_caches(self._host) if request.limits_cache else None)

    def read_disk_use(self, controllers: Iterable[NvmeController]) -> tuple[NvmeController, ...]:
        """Adds uses and contents, except of disks that guests own: the examination opens a disk exclusively for a moment."""
        with self._examining:  # two examinations of a disk at the same time would refuse each other
            owned = frozenset(disk.serial for claim in self._ledger.read().claims for disk in claim.plan.disks)
            return read_disk_use(self._host, controllers, owned=owned)

    def _finish_claim(self, pending: PendingClaim, request: GuestRequest) -> Claim:
        """Returns when the claim and its secrets are on the disk; otherwise there is neither."""
        uuid = pending.claim.plan.uuid
        try:
            try:
                self._secrets.write(uuid, request.secrets)
            except HostError:
                pending.withdraw()
                raise
            return pending.wait()
        except OrchestratorError:
            log_errors(lambda: self._secrets.remove(uuid))
            raise

    def _check(self, caller: Identity, request: GuestRequest) -> Image:
        _check_reserved(request)
        try:
            image = find_image(self._images, request.image)
        except NotFound:
            if caller.role is not Role.TENANT:
                raise
            # A tenant may see neither the images' folder nor the names of other tenants' images.
            raise NotFound(f"there is no guest image {request.image!r}", "ask the operator of the host for its images") from None
        _check_root(image, request)
        check_network_root(image, request)
        check_configurable(image, request, None if caller.role is Role.TENANT else self._images)
        return image

    def _plan(
        self,
        caller: Identity,
        request: GuestRequest,
        image: Image | None,
        reading: ClaimSnapshot,
        devices: _Devices,
    ) -> Placed:
        # Checked again: another guest may have been created with the same id meanwhile.
        find_by_request_id(caller, request, reading.claims)
        _check_name(request, {claim.plan.name for claim in reading.claims})
        owned = [claim.plan for claim in reading.claims if claim.owner == caller.tenant]
        request = _fit_disk(request, image)
        if not request.placement:
            check_quota(caller, request, request.cores, owned)
        check_secrets(caller, request, [claim.request for claim in reading.claims if claim.owner == caller.tenant])
        site = self._describe_site(caller, request)
        try:
            placed = self._find_place(request, reading.claims, devices, site, named=caller.role is not Role.TENANT)
        except NoRoom as error:
            if caller.role is not Role.TENANT:
                raise
            hidden = hide_device_owners(error, request)
            # A tenant may not see the survey.
            raise NoRoom(hidden.message.partition("\n")[0], hidden.reasons, "ask the operator of the host") from None
        _check_housekeeping(request, len(placed.plan.cpus))
        if request.placement:  # only the host knows how many cores that is
            check_quota(caller, request, len(placed.plan.cores), owned)
        return placed

    def _describe_site(self, caller: Identity, request: GuestRequest) -> Site:
        """Raises NotFound for a network that the caller's guests may not join."""
        known = self._ledger.networks()
        names = {nic.network for nic in request.wanted_nics if nic.network}
        # An operator may use each VLAN.
        closed = tuple(one for one in known.values() if caller.role is Role.TENANT and one.owner != caller.tenant)
        taken = frozenset(one.vlan for one in known.values())
        return Site({name: find_network(caller, name, known) for name in sorted(names)}, self._host_id, closed, taken)

    def _find_place(
        self, request: GuestRequest, claims: Sequence[Claim], devices: _Devices, site: Site, *, named: bool
    ) -> Placed:
        """Plans on the cached survey, or on a fresh one if there is no room or the host has changed.

        Disks in ``devices`` have their uses. ``named``: refusals and warnings may name unmanaged domains.
        """
        # Before the host is surveyed: see `AllocationIndex.to_allocated`.
        may_hold_pages = frozenset(
            claim.plan.name for claim in claims if claim.state not in _MAY_LACK_PAGES or claim.plan.uuid in self._launched
        )
        now = time.monotonic()
        for not_before in (now - SURVEY_MAX_AGE, now):
            topology = _with_devices(self.surveys.get(not_before), devices)
            try:
                placed = self._plan_on(topology, request, claims, may_hold_pages, site, named=named)
            except (NoRoom, VfsNeeded):
                if not_before == now:
                    raise
                continue
            if self.surveys.still_valid(topology, placed.plan):
                break
        if all(self.surveys.is_vf_free(topology, vf) for vf in placed.plan.vfs):
            return placed
        self.surveys.discard()
        topology = _with_devices(self.surveys.get(now), devices)
        unavailable = frozenset(vf.address for pf in topology.pfs for vf in pf.vfs if vf.driver == VFIO)
        return self._plan_on(topology, request, claims, may_hold_pages, site, unavailable, named=named)

    def _plan_on(
        self, topology: Topology, request: GuestRequest, claims: Sequence[Claim], may_hold_pages: frozenset[str],
        site: Site, unavailable_vfs: frozenset[PciAddress] = frozenset(), *, named: bool,
    ) -> Placed:  # fmt: skip
        # After the survey: it may count the pages of a guest that has ended since as free.
        running, domains = self._hypervisor.list_running(frozenset(claim.plan.uuid for claim in claims))
        _check_name(request, {domain.name for domain in domains})
        plans = [claim.plan for claim in claims]
        started = frozenset(plan.name for plan in plans if plan.name in may_hold_pages and plan.uuid in running)
        starting = frozenset(claim.plan.name for claim in claims if claim.state in _BEING_STARTED)
        self._index = index = self._index.updated(plans)  # a value: another thread may replace it
        allocated = index.to_allocated(started, starting)
        allocated, problems = add_unmanaged(
            self._host, allocated, domains, topology, self._uplinks.policy.housekeeping, named=named
        )
        plan = plan_known(request, topology, replace(allocated, vfs=allocated.vfs | unavailable_vfs), self._uplinks.policy, site)
        last_choices = list_last_choices(plan, allocated.last_cpus, allocated.last_vfs)
        return Placed(plan, last_choices, problems, topology)


def find_by_request_id(caller: Identity, request: GuestRequest, claims: Iterable[Claim]) -> Claim | None:
    """The guest that this request has created before. Raises Conflict if its request id was used for another request."""
    for claim in claims:
        if request.id is not None and (claim.request.id, claim.owner) == (request.id, caller.tenant):
            if claim.request == request:
                return claim
            what = f"request id {request.id} was already used for guest {claim.plan.name} with other fields"
            raise Conflict(what, "use a new id")
    return None


def _check_housekeeping(request: GuestRequest, count: int) -> None:
    if unknown := sorted(vcpu for vcpu in request.housekeeping_vcpus or () if vcpu >= count):
        what = f"housekeeping: guest {request.name} has no vCPU {unknown[0]}: it gets the vCPUs 0 to {count - 1}"
        raise RequestError(what, "name vCPUs of the guest, such as 0")
    policy = request.exit_policy
    for kind in set(VcpuClass) - set(classify_vcpus(count, request.housekeeping_vcpus)):
        if policy and policy.rules(kind):
            what = f"exit_policy: guest {request.name} has no {kind} vCPU that the budgets for {kind} vCPUs would limit"
            hint = f"name its housekeeping vCPUs (some of 0 to {count - 1}) in the request, or omit the budgets for {kind} vCPUs"
            raise RequestError(what, hint)


def _check_reserved(request: GuestRequest) -> None:
    if request.name == HOST:
        raise RequestError(f"invalid guest name {HOST}: reserved for the host itself", "choose another name")


def _check_root(image: Image, request: GuestRequest) -> None:
    """Raises RequestError if the guest cannot boot with its memory, or without a disk."""
    if image.disk and not image.ram_root and not request.disks:
        raise RequestError(f"image {image.name} has its root file system on a disk", "request a disk: --disk ''")
    needed = image.min_memory(has_disk=bool(request.disks))
    if request.size.bytes < needed.bytes:
        why = " for its root in memory" if needed != image.memory else ""
        what = f"image {image.name} needs {needed} of memory{why}, requested {request.memory}"
        raise RequestError(what, f"request at least {needed}")


def _with_devices(topology: Topology, devices: _Devices) -> Topology:
    if not any(devices):
        return topology
    controllers = devices.controllers or topology.controllers
    return replace(topology, controllers=controllers, volume_group=devices.group, caches=devices.caches)


def _fit_disk(request: GuestRequest, image: Image | None) -> GuestRequest:
    """The first disk must have room for the image."""
    if image is None or image.disk is None or not request.disks or request.disks[0].minimum >= image.disk.size:
        return request
    if request.network_disk:  # its size is unknown
        return request
    first = request.disks[0].model_copy(update={"size": str(Size(image.disk.size))})
    return request.model_copy(update={"disks": (first, *request.disks[1:])})


def _check_name(request: GuestRequest, taken: Container[str]) -> None:
    if request.name in taken:
        hint = "choose another name; `nohype guest list` and, on the host, `virsh list --all` show the names in use"
        raise Conflict(f"the name {request.name} is taken", hint)
