"""cache-exclusive: only the guest's cores fill its ways of the caches, and its limit of memory bandwidth is set. Pure."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.cache import BANDWIDTH, CacheControl, CacheDomain, CachePlan, CacheSurvey, ControlGroup, describe_ways
from orchestrator.model.proof import WEAKER, Measurement, Verdict, count_findings
from orchestrator.model.waiver import Waiver
from orchestrator.values import CpuSet

_NO_LIMIT = Measurement(Verdict.PASS, 0, ("the guest has not requested a part of the caches or of the memory bandwidth",))
_L3 = 3


def prove_cache_exclusive(guest: RunningGuest, promised: CachePlan | None, read: Callable[[], CacheSurvey]) -> Measurement:
    """``promised`` is the manager's record; None if the guest has requested no part. ``read`` is called only if it is needed."""
    if promised is None:
        return _NO_LIMIT
    if promised.waived:
        return Measurement(Verdict.NOT_MEASURED, None, (f"{WEAKER}{Waiver.SHARED_CACHE.reason}",))
    survey = read()
    cpus = CpuSet.of(cpu for vcpu in guest.vcpus for cpu in vcpu.pin)
    own = next((group for group in survey.groups if group.name and cpus and cpus <= group.cpus), None)
    if survey.fault or own is None:
        why = survey.fault or f"CPUs {cpus} are in no common control group"
        return Measurement(Verdict.FAIL, 1, (f"the guest's part of the caches is not enforced: {why}",))
    findings = [f"control group {own.name} has CPUs {own.cpus - cpus} that are not the guest's"] if own.cpus - cpus else []
    # "Resource allocation rules": a thread in a group other than the default one has that group's limits on each CPU.
    threads = {guest.pid, *(vcpu.tid for vcpu in guest.vcpus)}
    findings += [
        f"threads {', '.join(map(str, sorted(moved)))} of the guest are in control group {group.name}, whose limits they have"
        for group in survey.groups
        if group is not own and (moved := threads & group.tasks)
    ]
    evidence: list[str] = []
    for share in promised.shares:
        domain = next((one for one in survey.domains if (one.level, one.id) == (promised.level, share.id)), None)
        if domain is None or survey.cache is None:
            findings.append(f"L{promised.level} cache {share.id}: the kernel does not show it")
            continue
        wrong = _find_wrong_ways(own, domain, survey.cache, share.mask, survey.groups)
        findings += wrong
        if not wrong:
            evidence.append(f"L{domain.level} cache {domain.id}: {describe_ways(share.mask)} of {own.name} only")
    if promised.bandwidth is not None and (survey.bandwidth is None or survey.bandwidth.unit is not promised.unit):
        unit = survey.bandwidth.unit if survey.bandwidth else "no unit"
        findings.append(f"memory bandwidth is limited in {unit}, expected {promised.unit}")
    for id in promised.throttled:
        now = own.find(BANDWIDTH, id)
        text = f"memory bandwidth of L{_L3} cache {id}: limit {now}"
        if now == promised.bandwidth:
            evidence.append(text)
        else:
            findings.append(f"{text}, expected {promised.bandwidth}")
    return count_findings(findings, (*evidence, "/sys/fs/resctrl: schemata, cpus_list and tasks of all control groups"))


def _find_wrong_ways(
    own: ControlGroup, domain: CacheDomain, control: CacheControl, mask: int, groups: tuple[ControlGroup, ...]
) -> list[str]:
    where = f"L{domain.level} cache {domain.id}"
    found = [
        f"{where}: {line} of {own.name} is {describe_ways(now)}, expected {describe_ways(mask)}"
        for line in control.lines
        if (now := own.find(line, domain.id) or 0) != mask
    ]
    if devices := mask & control.shared:
        found.append(f"{where}: devices fill {describe_ways(devices)} too")
    for group in groups:
        # Tasks run anywhere; a group without tasks fills only the caches of its CPUs. The default group has all other tasks.
        fills = not group.name or group.has_tasks or group.cpus.meets(domain.cpus)
        if group is not own and fills and (common := mask & group.ways(control, domain.id)):
            found.append(f"{where}: {group.name or 'the default control group'} can fill {describe_ways(common)} too")
    return found
