"""Chooses cache ways and memory bandwidth for the cores of a guest. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import RequestError
from orchestrator.model.cache import (
    CacheControl,
    CacheDomain,
    CachePlan,
    CacheShare,
    CacheSurvey,
    find_runs,
    name_group,
    parse_bandwidth,
)
from orchestrator.model.request import GuestRequest
from orchestrator.model.waiver import Waiver
from orchestrator.planning.cores import Candidate
from orchestrator.planning.inputs import PlanningInput
from orchestrator.values import CpuSet

_L3 = 3


def find_caches(
    request: GuestRequest, candidates: list[Candidate], host: PlanningInput
) -> tuple[dict[int, CachePlan], list[str]]:
    """The part of the caches by node of the candidate, and a reason for each node without one. Empty if none is requested.

    Raises RequestError if the host cannot limit what the request limits.
    """
    if not request.limits_cache:
        return {}, []
    survey = host.topology.caches
    if lacks := _find_lacks(request, survey):
        if Waiver.SHARED_CACHE in {*request.accept, *host.policy.accept}:
            return {candidate.node: CachePlan() for candidate in candidates}, []
        hint = f"omit cache_ways and bandwidth, or accept it: --accept {Waiver.SHARED_CACHE}"
        raise RequestError(f"this host cannot limit what guest {request.name!r} requests: {lacks}", hint)
    assert survey
    found: dict[int, CachePlan] = {}
    refused: list[str] = []
    names = {name_group(name) for name, plan in host.allocated.caches.items() if not plan.waived}
    if len(names | {group.name for group in survey.groups}) >= survey.max_groups:
        return {}, [f"cache: all {survey.max_groups} control groups (CLOSIDs) of this host are used or owned by guests"]
    for candidate in candidates:
        try:
            found[candidate.node] = _plan_caches(request, candidate, survey, host.allocated.caches)
        except ValueError as error:
            refused.append(f"node {candidate.node}: {error}")
    return found, refused


def _find_lacks(request: GuestRequest, survey: CacheSurvey | None) -> str:
    """What is missing, in one sentence; empty if nothing is."""
    if survey is None or survey.fault:
        return survey.fault if survey else "its caches were not read"
    if request.cache_ways and not survey.cache:
        return "the CPUs cannot allocate cache ways (CAT)"
    if request.bandwidth and not survey.bandwidth:
        return "the CPUs cannot limit memory bandwidth (MBA)"
    if request.bandwidth and survey.bandwidth:
        try:
            survey.bandwidth.convert(parse_bandwidth(request.bandwidth))
        except ValueError as error:
            return str(error)
    return ""


def _plan_caches(request: GuestRequest, candidate: Candidate, survey: CacheSurvey, owned: Mapping[str, CachePlan]) -> CachePlan:
    """Raises ValueError with the reason."""
    cpus = CpuSet.of(cpu for core in candidate.cores for cpu in core)
    level = 0
    shares: tuple[CacheShare, ...] = ()
    if request.cache_ways and survey.cache:
        level = survey.cache.level
        shares = tuple(
            _choose_ways(request.cache_ways, domain, survey.cache, survey, owned) for domain in _find_domains(level, cpus, survey)
        )
    if not (request.bandwidth and survey.bandwidth):
        return CachePlan(level, shares)
    value = survey.bandwidth.convert(parse_bandwidth(request.bandwidth))
    throttled = tuple(domain.id for domain in _find_domains(_L3, cpus, survey))
    return CachePlan(level, shares, value, survey.bandwidth.unit, throttled)


def _find_domains(level: int, cpus: CpuSet, survey: CacheSurvey) -> tuple[CacheDomain, ...]:
    domains = survey.find_domains(level, cpus)
    if missing := cpus - CpuSet.of(cpu for domain in domains for cpu in domain.cpus):
        raise ValueError(f"the kernel does not show the L{level} cache of CPUs {missing}")
    return domains


def _choose_ways(
    count: int, domain: CacheDomain, control: CacheControl, survey: CacheSurvey, owned: Mapping[str, CachePlan]
) -> CacheShare:
    """Neighbouring ways that no other control group and no device fills. The smallest gap that is wide enough, its upper end.

    The default group keeps at least the minimum.
    """
    where = f"L{domain.level} cache {domain.id}"
    if count < control.min_ways:
        raise ValueError(f"{where}: a group has at least {control.min_ways} ways, {count} requested")
    taken = _find_taken(domain, control, survey, owned)
    free = control.full & ~taken & ~control.shared
    default = survey.groups[0].ways(control, domain.id) & ~taken
    for run in sorted(find_runs(free), key=lambda run: (run.bit_count(), -run)):
        for shift in range(run.bit_length() - count, -1, -1):
            mask = ((1 << count) - 1) << shift
            if mask & run == mask and any(rest.bit_count() >= control.min_ways for rest in find_runs(default & ~mask)):
                return CacheShare(domain.id, mask)
    widest = max((run.bit_count() for run in find_runs(free)), default=0)
    why = f", {control.shared.bit_count()} are shared with devices" if control.shared else ""
    raise ValueError(
        f"{where}: {count} neighbouring ways requested, at most {widest} of {control.full.bit_count()} are free,"
        f" of which the host keeps {control.min_ways}{why}"
    )


def _find_taken(domain: CacheDomain, control: CacheControl, survey: CacheSurvey, owned: Mapping[str, CachePlan]) -> int:
    """Mask of the ways that guests own, or control groups of other programs may fill."""
    mask = 0
    for plan in owned.values():
        for share in plan.shares:
            mask |= share.mask if (plan.level, share.id) == (domain.level, domain.id) else 0
    own = {name_group(name) for name in owned}
    for group in survey.groups[1:]:
        mask |= 0 if group.name in own else group.ways(control, domain.id)
    return mask
