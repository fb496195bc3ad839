"""Whether a guest's huge pages come back when it has ended. Programs may have some too, also in files that nobody has open, as
DPDK leaves them: so what the pool lacks then is compared with what it lacked before the guest was started.
"""

from __future__ import annotations

import time

from orchestrator.errors import HostError
from orchestrator.host.hugepages import find_pool
from orchestrator.host.processes import read_boot_id, read_huge_pages
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import Hypervisor
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Plan
from orchestrator.resources.step import Arguments

PAGES = "pages"
"""Its key in the undo journal: to undo that a guest takes pages is to see them come back."""

_RETURN = 10.0


def note_missing(host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, plan: Plan) -> None:
    """Writes down, before a guest takes its pages, how many its pool lacks of which nobody knows who has them."""
    if not _is_noted(ledger, plan):
        missing, _ = _count_missing(host, hypervisor, ledger, plan)
        ledger.record(plan.name, PAGES, {"missing": max(0, missing), "boot": read_boot_id(host)})


def await_pages(host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, plan: Plan, arguments: Arguments) -> None:
    """Waits until the pool lacks no more than it did. The kernel frees the pages of a process some time after its end.

    Args:
        arguments: of ``note_missing``. After a reboot there is nothing to wait for.

    Raises:
        HostError: some of the guest's pages have not come back.
    """
    if arguments["boot"] != read_boot_id(host):
        return
    before, deadline = int(str(arguments["missing"])), time.monotonic() + _RETURN
    while True:
        now, who = _count_missing(host, hypervisor, ledger, plan, more_than=before)
        missing = min(now - before, plan.pages)
        if missing <= 0:
            return
        if time.monotonic() > deadline:
            what = f"{missing} of its {plan.pages} huge pages of {plan.page_size} on node {plan.node} did not come back: {who}"
            raise HostError(what, "if another program has taken them meanwhile, clear it by force")
        time.sleep(0.2)


def _count_missing(host: HostRoot, hypervisor: Hypervisor, ledger: Ledger, plan: Plan, *, more_than: int = 0) -> tuple[int, str]:
    """Pages of the guest's pool that neither other guests nor programs are known to have, and the figures in words.

    Args:
        more_than: programs, which take a long look, are asked only if more than these are missing without.
    """
    pool = find_pool(host, plan.node, plan.page_size)
    total, free = (pool.total, pool.free) if pool else (0, 0)
    others = _used_by_guests(hypervisor, ledger, plan)
    missing, words = total - free - others, f"{free} of {total} are free, other guests use at most {others}"
    if missing <= more_than:
        return missing, words
    programs = _used_by_programs(host, hypervisor, plan)
    return missing - programs, f"{words}, programs {programs}"


def _is_noted(ledger: Ledger, plan: Plan) -> bool:
    """Whether a guest is about to take its pages, has them, or has not been seen to give them back."""
    return any(record.action == PAGES for record in ledger.pending(plan.name))


def _used_by_programs(host: HostRoot, hypervisor: Hypervisor, plan: Plan) -> int:
    """Pages that programs have which are no guests, on all nodes: of which node they are is not told without a long look."""
    guests = {domain.pid for domain in hypervisor.list_running(frozenset())[1] if domain.memory}
    return sum(size for pid, size in read_huge_pages(host).items() if pid not in guests) // plan.page_size.bytes


def _used_by_guests(hypervisor: Hypervisor, ledger: Ledger, plan: Plan) -> int:
    """Pages of the pool that other guests use at the most: those that run, ours or not, and ours whose pages are not back."""
    claims = [claim for claim in ledger.read().claims if claim.plan.name != plan.name]
    running, unmanaged = hypervisor.list_running(frozenset({plan.uuid, *(claim.plan.uuid for claim in claims)}))
    used = sum(
        claim.plan.pages
        for claim in claims
        if (claim.plan.node, claim.plan.page_size) == (plan.node, plan.page_size)
        and (claim.plan.uuid in running or _is_noted(ledger, claim.plan))
    )
    names = {claim.plan.name for claim in claims}
    # A domain that is bound to no node, or to several, may have all of its memory on this one.
    sizes = [
        domain.memory.bytes
        for domain in unmanaged
        if domain.running and domain.memory and domain.name not in names and plan.node in (domain.nodes or {plan.node})
    ]
    return used + sum(-(-size // plan.page_size.bytes) for size in sizes)
