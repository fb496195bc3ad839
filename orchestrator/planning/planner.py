"""Plans a guest: request, topology and allocated resources → plan, or NoRoom. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from orchestrator.errors import NoRoom, RequestError
from orchestrator.model.cache import CachePlan
from orchestrator.model.plan import Allocated, ImageRef, Plan, Policy
from orchestrator.model.request import GuestRequest
from orchestrator.model.topology import NvmeController, Topology
from orchestrator.planning.cache import find_caches
from orchestrator.planning.cores import Candidate, check_placement, find_candidates, list_isolation
from orchestrator.planning.disk import DISK, check_waivers, count_remote, describe_disks, find_free, list_targets, plan_disks
from orchestrator.planning.host_check import find_blockers
from orchestrator.planning.inputs import NO_SITE, PlanningInput, Site
from orchestrator.planning.memory import PageRequest
from orchestrator.planning.nic import UPLINK, FreeNic, find_nics, list_addresses, plan_nics
from orchestrator.values import Size


def plan_guest(request: GuestRequest, topology: Topology, allocated: Allocated, policy: Policy, site: Site = NO_SITE) -> Plan:
    """Chooses whole physical cores, huge pages of the same node, VFs and disks. The same input gives the same plan.

    Preferences, in this order: resources that no unmanaged domain may use later; the node of the VFs' PFs and the disks; the node
    with the fewest cores left over; neighbouring cores; the fewest pages left over; the uplink that is configured first; the
    lower node.

    Raises:
        RequestError: the memory is not a multiple of the page size, the placement has another number of cores than requested, or
            the guest would lack a property without the request or the policy accepting that.
        NoRoom: with a reason per NUMA node and uplink, or per wrong part of the placement.
    """
    check_waivers(request, policy)
    page_size = Size.parse(request.page_size) if request.page_size else policy.page_size
    pages = PageRequest(page_size, _count_pages(request.size, page_size))
    host = PlanningInput(topology, allocated, policy, site)
    if request.placement:
        _check_count(request, topology)
        candidates, no_cores = check_placement(request.placement.cpu_set, pages, host)
    else:
        candidates, no_cores = find_candidates(request.cores, pages, host)
    caches, no_caches = find_caches(request, candidates, host)
    if caches or no_caches:
        candidates = [candidate for candidate in candidates if candidate.node in caches]
    choices, no_vfs = find_nics(request, host)
    disks, no_disks = find_free(request, host)
    blockers = find_blockers(policy, topology)
    if not choices or not candidates or no_disks or blockers:
        hint = "`nohype survey` shows what the host has, `nohype guest list` who owns it"
        reasons = (*(f"host: {blocker.text}" for blocker in blockers), *no_vfs, *no_disks, *no_cores, *no_caches)
        raise NoRoom(
            f"no room for guest {request.name!r} ({_describe(request, pages)})",
            reasons,
            next((blocker.hint for blocker in blockers), hint),
        )

    # Computed per choice of NICs: there are uplinks times nodes pairs.
    last_vfs = {id(vfs): sum(vf.address in allocated.last_vfs for vf in vfs) for vfs in choices}
    remote = {candidate.node: count_remote(request, disks, candidate.node) for candidate in candidates}
    nodes = {id(vfs): [vf.node for vf in vfs if vf.node is not None] for vfs in choices}

    def rank(pair: tuple[tuple[FreeNic, ...], Candidate]) -> tuple[int, int, tuple[int, int, int]]:
        vfs, candidate = pair
        vf_nodes = nodes[id(vfs)]
        far = len(vf_nodes) - vf_nodes.count(candidate.node) + remote[candidate.node]
        return candidate.last + last_vfs[id(vfs)], far, candidate.left

    # min() returns the first of equal pairs, and both lists are in order of preference.
    vfs, candidate = min(product(choices, candidates), key=rank)
    return _build_plan(request, pages, candidate, vfs, disks, caches.get(candidate.node), host)


def hide_device_owners(error: NoRoom, request: GuestRequest) -> NoRoom:
    """Removes the reasons of named VFs and of disks, which tenants may not see."""
    named = [nic.vf for nic in request.wanted_nics if nic.vf]
    reasons = tuple(reason for reason in error.reasons if not named or not reason.startswith(UPLINK))
    if len(reasons) != len(error.reasons):
        reasons = (f"VF {', '.join(named)} is not available", *reasons)
    if any(reason.startswith(DISK) for reason in reasons):
        hidden = tuple(reason for reason in reasons if not reason.startswith(DISK))
        reasons = ("no suitable disks are available", *hidden)
    return NoRoom(error.message.partition("\n")[0], reasons, error.hint)


def _build_plan(
    request: GuestRequest, pages: PageRequest, candidate: Candidate, vfs: Sequence[FreeNic], disks: Sequence[NvmeController],
    caches: CachePlan | None, host: PlanningInput,
) -> Plan:  # fmt: skip
    smt = len(candidate.cores[0]) > 1
    words = (*list_isolation(request, sum(len(core.ids) for core in candidate.cores)), request.cmdline)
    return Plan(
        name=request.name,
        cores=candidate.cores,
        node=candidate.node,
        page_size=pages.size,
        pages=pages.count,
        nics=plan_nics(request, vfs, host),
        image=ImageRef(request.image),
        cmdline=" ".join(filter(None, (*words, *list_addresses(request.wanted_nics), *list_targets(request)))),
        # -cpu host does not include topoext (target/i386/cpu.c, no_autoenable_flags), without which a guest sees no threads.
        cpu_features=("topoext",) if smt and host.topology.topoext else (),
        disks=plan_disks(request, disks, candidate.node, host.policy.disk_folder, host.topology.volume_group),
        iommu=bool(host.topology.iommu_groups),
        caches=caches,
    )


def _describe(request: GuestRequest, pages: PageRequest) -> str:
    given = request.placement
    cores = f"the cores of CPUs {given.cpus}" if given else f"{request.cores} whole core{'s' * (request.cores > 1)}"
    memory = f"{pages.count} huge page{'s' * (pages.count > 1)} of {pages.size}"
    return f"{cores}, {memory}, {_describe_vfs(request)}{describe_disks(request)}"


def _describe_vfs(request: GuestRequest) -> str:
    nics = request.wanted_nics
    named = [f"VF {nic.vf}" for nic in nics if nic.vf]
    unnamed = len(nics) - len(named)
    return ", ".join([*named, *([f"{unnamed} VFs" if unnamed > 1 else "a VF"] if unnamed else [])])


def _count_pages(memory: Size, page_size: Size) -> int:
    pages, rest = divmod(memory.bytes, page_size.bytes)
    if rest:
        good = [str(Size(count * page_size.bytes)) for count in (pages, pages + 1) if count]
        raise RequestError(f"memory {memory} is not a multiple of the huge page size {page_size}", f"use {' or '.join(good)}")
    return pages


def _check_count(request: GuestRequest, topology: Topology) -> None:
    """``cores`` is optional with a placement, but must agree with it. A partly named core counts as one."""
    cpus = request.placement.cpu_set if request.placement else topology.cpus
    given = sum(1 for core in topology.cores if core.cpus & cpus)
    if "cores" in request.model_fields_set and cpus <= topology.cpus and given != request.cores:
        raise RequestError(
            f"cores is {request.cores}, but placement.cpus {cpus} are {given} cores of this host",
            "omit cores, or correct it",
        )
