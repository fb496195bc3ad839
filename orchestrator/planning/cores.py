"""Chooses whole physical cores and huge pages of one NUMA node. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import RequestError
from orchestrator.model.request import GuestRequest
from orchestrator.model.topology import Core, list_nodes
from orchestrator.planning.inputs import PlanningInput
from orchestrator.planning.memory import PageRequest, count_free, find_lacking_pages
from orchestrator.values import CpuSet

_LONGEST_ISOLATION = 512
"""Characters for the words of a profile. The kernel reads 2,047 of its command line, and images and requests have words too."""


@dataclass(frozen=True)
class Candidate:
    """Cores and pages of one node that a guest could get.

    Attributes:
        left: (usable cores left over, runs that the cores are taken from, free pages) of the node. The smallest is the best fit.
    """

    node: int
    cores: tuple[CpuSet, ...]  # the CPUs of each core, in the order of the node's cores
    left: tuple[int, int, int]
    last: bool = False  # unmanaged domains may use some of the cores later: any other candidate is better


def find_candidates(count: int, pages: PageRequest, host: PlanningInput) -> tuple[list[Candidate], list[str]]:
    """The best candidate per node, and a reason for each node without one.

    The guest gets the smallest run of neighbouring cores that is long enough, otherwise the fewest runs.
    """
    candidates: list[Candidate] = []
    refused: list[str] = []
    for node, cores in host.topology.nodes:
        runs, unusable = _find_runs(cores, host, last=False)
        chosen, last = _choose_cores(count, runs), False
        if not chosen and host.allocated.last_cpus:
            runs, unusable = _find_runs(cores, host, last=True)
            chosen, last = _choose_cores(count, runs), True
        usable = sum(map(len, runs))
        free = count_free(pages.size, node, host)
        lacks = [] if chosen else [_describe_lack(count, usable, len(cores), unusable)]
        lacks += find_lacking_pages(pages, free, node, host)
        if chosen and not lacks:
            left = (usable - count, _count_runs(chosen, runs), free)
            candidates.append(Candidate(node, tuple(core.cpus for core in chosen), left, last))
        else:
            refused.append(f"node {node}: {'; '.join(lacks)}")
    return candidates, refused


def check_placement(cpus: CpuSet, pages: PageRequest, host: PlanningInput) -> tuple[list[Candidate], list[str]]:
    """The prescribed CPUs as the only candidate, or the reasons why they are not usable."""
    cores = [core for _, of_node in host.topology.nodes for core in of_node if core.cpus & cpus]
    missing = cpus - host.topology.cpus
    wrong = [f"the host has no CPUs {missing}, or they are offline"] if missing else []
    wrong += [f"CPUs {core.cpus & cpus} are not the whole core {core.cpus}" for core in cores if not core.cpus <= cpus]
    _, unusable = _find_runs(cores, host, last=True)
    wrong += [f"CPUs {of_reason & cpus} {reason}" for reason, of_reason in unusable.items()]
    nodes = {node: CpuSet.of(cpu for core in of_node for cpu in core.cpus) & cpus for node, of_node in list_nodes(cores)}
    if len(nodes) > 1:
        wrong.append("CPUs span several nodes: " + ", ".join(f"{some} on node {node}" for node, some in nodes.items()))
    widths = sorted({len(core.cpus) for core in cores})
    if len(widths) > 1:
        wrong.append(f"cores have different numbers of threads: {' and '.join(map(str, widths))}")
    refused = [f"placement: {reason}" for reason in wrong]
    for node in nodes if len(nodes) == 1 else ():
        lacks = find_lacking_pages(pages, count_free(pages.size, node, host), node, host)
        refused += [f"node {node}: {lack}" for lack in lacks]
        if not refused:
            return [Candidate(node, tuple(core.cpus for core in cores), (0, 0, 0))], []
    return [], refused


def _find_runs(cores: Sequence[Core], host: PlanningInput, *, last: bool) -> tuple[list[list[Core]], dict[str, CpuSet]]:
    """Runs of usable neighbouring cores of one socket and SMT width, and the unusable CPUs by reason.

    ``last``: include cores that unmanaged domains may use later.
    """
    runs: list[list[Core]] = []
    unusable: dict[str, set[int]] = {}
    # The most frequent reasons come first and need no call: hosts have up to a thousand cores.
    housekeeping, owned, isolated = host.policy.housekeeping.ids, host.allocated.cpus.ids, host.topology.isolated.ids
    is_shared = bool(host.allocated.pinned or (host.allocated.last_cpus and not last))
    before: tuple[int, int] | None = None
    for core in cores:
        ids = core.cpus.ids
        if not ids.isdisjoint(housekeeping):
            reason = "are housekeeping"
        elif not ids.isdisjoint(owned):
            reason = "are owned by guests"
        elif is_shared or (isolated and not ids <= isolated):
            reason = _reason_unusable(core, host, last=last)
        else:
            reason = ""
        if reason:
            unusable.setdefault(reason, set()).update(ids)
            before = None
            continue
        kind = core.socket, len(ids)
        if kind == before:
            runs[-1].append(core)
        else:
            runs.append([core])
        before = kind
    return runs, {reason: CpuSet.of(cpus) for reason, cpus in unusable.items()}


def _reason_unusable(core: Core, host: PlanningInput, *, last: bool) -> str:
    if host.allocated.pinned and (use := _describe_use(core, host.allocated.pinned)):
        return use
    if host.allocated.last_cpus and not last and (use := _describe_use(core, host.allocated.last_cpus)):
        return use
    if host.topology.isolated and not core.cpus <= host.topology.isolated:
        return "are not isolated"
    return ""


def _describe_use(core: Core, used: Mapping[int, str]) -> str:
    return " and ".join(sorted({used[cpu] for cpu in core.cpus.ids if cpu in used}))


def _choose_cores(count: int, runs: Sequence[Sequence[Core]]) -> list[Core]:
    """Empty if there are too few. A guest's topology has one SMT width, so cores of different widths (hybrid CPUs, offline
    siblings) are not mixed. Wider cores are preferred.
    """
    for width in sorted({len(run[0].cpus) for run in runs}, reverse=True):
        alike = [run for run in runs if len(run[0].cpus) == width]
        if sum(map(len, alike)) >= count:
            return _take(count, alike)
    return []


def _take(count: int, runs: Sequence[Sequence[Core]]) -> list[Core]:
    """Uses the longest runs whole until one run is long enough for the rest, which comes from the shortest such run."""
    taken: list[Core] = []
    longest_first = sorted(runs, key=len, reverse=True)
    for position, run in enumerate(longest_first):
        rest = count - len(taken)
        if len(run) >= rest:
            taken += min((run for run in longest_first[position:] if len(run) >= rest), key=len)[:rest]
            break
        taken += run
    return sorted(taken, key=lambda core: (core.socket, min(core.cpus.ids)))


def _count_runs(chosen: Sequence[Core], runs: Sequence[Sequence[Core]]) -> int:
    cpus = {cpu for core in chosen for cpu in core.cpus.ids}
    return sum(any(cpus & core.cpus.ids for core in run) for run in runs)


def _describe_lack(count: int, usable: int, total: int, unusable: dict[str, CpuSet]) -> str:
    reasons = ", ".join(f"cpus {cpus} {reason}" for reason, cpus in unusable.items())
    same = " with the same number of threads" if usable >= count else ""
    return f"{usable} of {total} whole cores are free, {count} requested{same}" + (f" ({reasons})" if reasons else "")


def list_isolation(request: GuestRequest, count: int) -> tuple[str, ...]:
    """Words for the kernel of a guest with ``count`` vCPUs and the profile `tickless`: only the application runs on vCPUs that do
    not do the housekeeping (Documentation/admin-guide/kernel-parameters.txt). Raises RequestError if there are none.
    """
    if request.profile is None:
        return ()
    kept = request.housekeeping_vcpus or frozenset[int]()
    application = CpuSet.of(set(range(count)) - kept)
    if not application:
        what = f"profile {request.profile}: all {count} vCPUs of guest {request.name} do the housekeeping"
        raise RequestError(what, "name fewer of them, such as 0, or request more cores")
    lists = (f"isolcpus=managed_irq,domain,{application}", f"nohz_full={application}", f"rcu_nocbs={application}")
    words = (*lists, f"irqaffinity={CpuSet.of(kept)}")
    if (size := len(" ".join(words))) > _LONGEST_ISOLATION:
        what = f"profile {request.profile}: its words for the kernel of guest {request.name} have {size} characters, at most"
        hint = "name the housekeeping vCPUs as few ranges, such as 0-7"
        raise RequestError(f"{what} {_LONGEST_ISOLATION} have room", hint)
    return words
