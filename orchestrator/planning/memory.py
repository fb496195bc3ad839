"""Counts the huge pages of a node that a guest may have. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.model.topology import PagePool
from orchestrator.planning.inputs import PlanningInput
from orchestrator.values import Size


@dataclass(frozen=True)
class PageRequest:
    size: Size
    count: int


def count_free(page_size: Size, node: int, host: PlanningInput) -> int:
    """The smallest of three bounds:

    1. The free pages of the pool, without pages that guests will still take from it.
    2. All pages, without the reserved share and pages that guests own, even if the pool shows these as free. Pages that host
       programs use count as part of the reserved share, whichever is greater.
    3. The free pages of all nodes, without pages that the kernel has promised to programs (mm/hugetlb.c, hugetlb_acct_memory).
    """
    pool = _find_pool(page_size, node, host.topology.pools)
    claim = next((claim for claim in host.allocated.pages if claim.node == node and claim.page_size == page_size), None)
    if not pool:
        return 0
    owned, unused = (claim.owned, claim.unused) if claim else (0, 0)
    free = min(pool.free - unused, pool.total - host.policy.reserved(page_size) - owned)
    promised = _count_promised(page_size, host)
    if promised:
        unused = sum(claim.unused for claim in host.allocated.pages if claim.page_size == page_size)
        machine = sum(pool.free for pool in host.topology.pools if pool.page_size == page_size)
        free = min(free, machine - unused - promised)
    return max(0, free)


def _count_promised(page_size: Size, host: PlanningInput) -> int:
    """Pages promised to other programs. Starting guests already own the pages promised to them."""
    promised = sum(promise.count for promise in host.topology.promised if promise.page_size == page_size)
    return max(0, promised - sum(claim.starting for claim in host.allocated.pages if claim.page_size == page_size))


def _find_pool(page_size: Size, node: int, pools: Iterable[PagePool]) -> PagePool | None:
    return next((pool for pool in pools if pool.node == node and pool.page_size == page_size), None)


def find_lacking_pages(wanted: PageRequest, free: int, node: int, host: PlanningInput) -> list[str]:
    pools = host.topology.pools
    pool = _find_pool(wanted.size, node, pools)
    if not pool or not pool.total:
        sizes = " and ".join(str(pool.page_size) for pool in pools if pool.node == node and pool.total)
        return [f"no huge pages of {wanted.size}" + (f", only of {sizes}" if sizes else "")]
    if free >= wanted.count:
        return []
    promised = _count_promised(wanted.size, host)
    why = (
        f" (the pool shows {pool.free} as free; programs have reserved {promised} on the host and not used them yet:"
        " resv_hugepages)"
        if promised
        else ""
    )
    return [f"{free} of {pool.total} huge pages of {wanted.size} are free, {wanted.count} requested{why}"]
