"""Where on a host there is room for a guest's cores and memory: whole physical cores and huge pages of one NUMA node. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.model.plan import Claims, Policy
from orchestrator.model.topology import Core, PagePool, Topology, list_nodes
from orchestrator.values import CpuSet, Size


@dataclass(frozen=True)
class Place:
    """Cores and pages of one node that a guest could get.

    Attributes:
        node: NUMA node of both.
        cores: the CPUs of each core, in the order of the node's cores.
        last: whether others may use some of the cores later: any place where that is not so is better.
        left: (usable cores, runs that the cores are taken from, free pages) of the node; of two places that with less of
            them is the better fit: it leaves the other node whole.
    """

    node: int
    cores: tuple[CpuSet, ...]
    left: tuple[int, int, int]
    last: bool = False


@dataclass(frozen=True)
class Host:
    """What places are looked for in.

    Attributes:
        topology: the host.
        taken: what guests own.
        policy: what the operator keeps from them.
    """

    topology: Topology
    taken: Claims
    policy: Policy


@dataclass(frozen=True)
class Pages:
    """Huge pages that a guest wants."""

    size: Size
    count: int


def find_places(count: int, pages: Pages, host: Host) -> tuple[list[Place], list[str]]:
    """The best place on each node that has room, and why each of the others has none.

    Of a node's cores the guest gets a run of neighbours: the smallest that is long enough, so that the longer ones stay
    whole for bigger guests. Where none is long enough, it gets as few runs as can be.

    Args:
        count: how many whole cores.
    """
    places: list[Place] = []
    refused: list[str] = []
    for node, cores in host.topology.nodes:
        runs, unusable = _find_runs(cores, host, last=False)
        chosen, last = _choose_cores(count, runs), False
        if not chosen and host.taken.last_cpus:
            runs, unusable = _find_runs(cores, host, last=True)
            chosen, last = _choose_cores(count, runs), True
        usable = sum(map(len, runs))
        free = _count_free(pages.size, node, host)
        lacks = [] if chosen else [_describe_lack(count, usable, len(cores), unusable)]
        lacks += _check_pages(pages, free, node, host)
        if chosen and not lacks:
            left = (usable - count, _count_runs(chosen, runs), free)
            places.append(Place(node, tuple(core.cpus for core in chosen), left, last))
        else:
            refused.append(f"node {node}: {'; '.join(lacks)}")
    return places, refused


def check_place(cpus: CpuSet, pages: Pages, host: Host) -> tuple[list[Place], list[str]]:
    """The given place, if all of it can be had, or what is wrong with each part of it.

    Args:
        cpus: all CPUs of the wanted cores.
    """
    cores = [core for _, of_node in host.topology.nodes for core in of_node if core.cpus & cpus]
    missing = cpus - host.topology.cpus
    wrong = [f"the host has no CPUs {missing}, or they are offline"] if missing else []
    wrong += [f"CPUs {core.cpus & cpus} are not the whole core {core.cpus}" for core in cores if not core.cpus <= cpus]
    _, unusable = _find_runs(cores, host, last=True)
    wrong += [f"CPUs {of_reason & cpus} {reason}" for reason, of_reason in unusable.items()]
    nodes = {node: CpuSet.of(cpu for core in of_node for cpu in core.cpus) & cpus for node, of_node in list_nodes(cores)}
    if len(nodes) > 1:
        wrong.append("they are of several NUMA nodes: " + ", ".join(f"{some} of node {node}" for node, some in nodes.items()))
    widths = sorted({len(core.cpus) for core in cores})
    if len(widths) > 1:
        wrong.append(f"their cores have different numbers of threads: {' and '.join(map(str, widths))}")
    refused = [f"placement: {reason}" for reason in wrong]
    for node in nodes if len(nodes) == 1 else ():
        lacks = _check_pages(pages, _count_free(pages.size, node, host), node, host)
        refused += [f"node {node}: {lack}" for lack in lacks]
        if not refused:
            return [Place(node, tuple(core.cpus for core in cores), (0, 0, 0))], []
    return [], refused


def _find_runs(cores: Sequence[Core], host: Host, *, last: bool) -> tuple[list[list[Core]], dict[str, CpuSet]]:
    """The longest runs of neighbours that a guest may have, and the CPUs it may not have, by reason.

    ``last``: whether cores that others may use later are among the first.

    All cores of a run have the same number of threads. Only a host without NUMA has several sockets in one node.
    """
    runs: list[list[Core]] = []
    unusable: dict[str, set[int]] = {}
    # One look per core for the two reasons that most cores have: hosts have a thousand.
    housekeeping, owned = host.policy.housekeeping.ids, host.taken.cpus.ids
    before: tuple[int, int] | None = None
    for core in cores:
        ids = core.cpus.ids
        if not ids.isdisjoint(housekeeping):
            reason = "are housekeeping"
        elif not ids.isdisjoint(owned):
            reason = "are guests'"
        else:
            reason = _why_not(core, host, last=last)
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


def _why_not(core: Core, host: Host, *, last: bool) -> str:
    if host.taken.pinned and (use := _describe_use(core, host.taken.pinned)):
        return use
    if host.taken.last_cpus and not last and (use := _describe_use(core, host.taken.last_cpus)):
        return use
    if host.topology.isolated and not core.cpus <= host.topology.isolated:
        return "are not isolated"
    return ""


def _describe_use(core: Core, used: Mapping[int, str]) -> str:
    return " and ".join(sorted({used[cpu] for cpu in core.cpus.ids if cpu in used}))


def _choose_cores(count: int, runs: Sequence[Sequence[Core]]) -> list[Core]:
    """Cores of one width, or none if there are too few.

    A guest's topology has one SMT width, so cores of different width (a sibling is offline, hybrid CPUs) are not mixed; the
    widest are preferred.
    """
    for width in sorted({len(run[0].cpus) for run in runs}, reverse=True):
        alike = [run for run in runs if len(run[0].cpus) == width]
        if sum(map(len, alike)) >= count:
            return _take(count, alike)
    return []


def _take(count: int, runs: Sequence[Sequence[Core]]) -> list[Core]:
    """``count`` of the runs' cores: the longest runs whole as long as none is long enough for the rest, which is taken from
    the shortest that is. Of equal runs the first."""
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
    return f"{usable} of {total} whole cores are free, {count} are wanted{same}" + (f" ({reasons})" if reasons else "")


def _count_free(page_size: Size, node: int, host: Host) -> int:
    """How many pages of a node a guest may have.

    What the pool shows as free, less what guests will still take from it. The second bound holds even if ``unused`` is too
    small, as for a guest that has ended and still holds its claim: what is owned is never given twice. What programs of the
    host have taken already counts as a part of its reserved share, whatever is the greater. The third is the kernel's own, for
    all nodes together: what it has promised to programs that have not used it yet (mm/hugetlb.c, hugetlb_acct_memory).
    """
    pool = _find_pool(page_size, node, host.topology.pools)
    claim = next((claim for claim in host.taken.pages if claim.node == node and claim.page_size == page_size), None)
    if not pool:
        return 0
    owned, unused = (claim.owned, claim.unused) if claim else (0, 0)
    free = min(pool.free - unused, pool.total - host.policy.reserved(page_size) - owned)
    promised = _count_promised(page_size, host)
    if promised:
        others = sum(claim.unused for claim in host.taken.pages if claim.page_size == page_size)
        machine = sum(pool.free for pool in host.topology.pools if pool.page_size == page_size)
        free = min(free, machine - others - promised)
    return max(0, free)


def _count_promised(page_size: Size, host: Host) -> int:
    """Pages that the kernel has promised to other programs. What it has promised to guests that are being started counts as
    theirs: those own it."""
    promised = sum(promise.count for promise in host.topology.promised if promise.page_size == page_size)
    return max(0, promised - sum(claim.starting for claim in host.taken.pages if claim.page_size == page_size))


def _find_pool(page_size: Size, node: int, pools: Iterable[PagePool]) -> PagePool | None:
    return next((pool for pool in pools if pool.node == node and pool.page_size == page_size), None)


def _check_pages(wanted: Pages, free: int, node: int, host: Host) -> list[str]:
    """What is lacking, if anything."""
    pools = host.topology.pools
    pool = _find_pool(wanted.size, node, pools)
    if not pool or not pool.total:
        others = " and ".join(str(pool.page_size) for pool in pools if pool.node == node and pool.total)
        return [f"it has no huge pages of {wanted.size}" + (f", only of {others}" if others else "")]
    if free >= wanted.count:
        return []
    promised = _count_promised(wanted.size, host)
    why = (
        f" (the pool shows {pool.free} as free; programs have reserved {promised} on the host and not used them yet:"
        " resv_hugepages)"
        if promised
        else ""
    )
    return [f"{free} of {pool.total} huge pages of {wanted.size} are free, {wanted.count} are wanted{why}"]
