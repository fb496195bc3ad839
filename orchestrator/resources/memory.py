"""Checks that a guest's huge pages return to the pool after its end.

Programs use huge pages too, some in files that no process has open (DPDK). So the number of unaccounted pages after the end is
compared with their number before the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from xml.etree.ElementTree import Element

from orchestrator.errors import HostError
from orchestrator.host.hugepages import find_pool
from orchestrator.host.processes import read_boot_id, read_huge_pages
from orchestrator.host.root import HostRoot
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Plan
from orchestrator.resources.step import Arguments, GuestContext, UndoContext, parse_arguments, register, to_arguments
from orchestrator.resources.xml import element
from orchestrator.waiting import wait_until

RETURN_SECONDS = 10.0
"""The kernel frees the pages of a process some time after its end."""


@dataclass(frozen=True)
class PagesBefore:
    """The number of unaccounted pages of the guest's pool, and the boot in which they were counted."""

    missing: int
    boot: str


@register
@dataclass(frozen=True)
class TakePages:
    """QEMU takes the pages: this step records the number of unaccounted pages before."""

    action: ClassVar[str] = "pages"
    guest: GuestContext

    def describe(self) -> str:
        plan = self.guest.plan
        return f"take {plan.pages} huge pages of {plan.page_size} on node {plan.node}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        if _has_pages_record(self.guest.ledger, self.guest.plan):
            return None
        missing, _ = _count_unaccounted(host, self.guest)
        return to_arguments(PagesBefore(max(0, missing), read_boot_id(host)))

    def apply(self, host: HostRoot) -> None:
        pass

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """Waits for the pages. Raises HostError if some were not returned. No-op after a reboot."""
        host, guest, before = context.host, context.guest, parse_arguments(PagesBefore, arguments)
        if guest is None or before.boot != read_boot_id(host):
            return
        unaccounted, users = wait_until(
            lambda: _count_unaccounted(host, guest, more_than=before.missing),
            lambda counted: counted[0] <= before.missing,
            timeout=RETURN_SECONDS, interval=0.2,
        )  # fmt: skip
        plan = guest.plan
        if (missing := min(unaccounted - before.missing, plan.pages)) > 0:
            raise HostError(
                f"{missing} of {plan.pages} huge pages of {plan.page_size} on node {plan.node} were not returned: {users}",
                "if another program took them, clear the guest with --force",
            )


def _count_unaccounted(host: HostRoot, guest: GuestContext, *, more_than: int = 0) -> tuple[int, str]:
    """Pages of the guest's pool without a known user, and the calculation in words.

    ``more_than``: pages of programs, which take long to read, are read only if more pages than this are unaccounted without them.
    """
    plan = guest.plan
    pool = find_pool(host, plan.node, plan.page_size)
    total, free = (pool.total, pool.free) if pool else (0, 0)
    by_guests = _count_used_by_guests(guest)
    missing, words = total - free - by_guests, f"{free} of {total} are free, other guests use at most {by_guests}"
    if missing <= more_than:
        return missing, words
    programs = _count_used_by_programs(host, guest)
    return missing - programs, f"{words}, programs {programs}"


def _has_pages_record(ledger: Ledger, plan: Plan) -> bool:
    """The guest is about to take its pages, has them, or was not verified to have returned them."""
    return any(record.action == TakePages.action for record in ledger.undo_records(plan.name))


def _count_used_by_programs(host: HostRoot, guest: GuestContext) -> int:
    """Pages on all nodes that programs other than guests use: finding their nodes takes long (numa_maps)."""
    guests = {domain.pid for domain in guest.hypervisor.list_running(frozenset())[1] if domain.memory}
    return sum(size for pid, size in read_huge_pages(host).items() if pid not in guests) // guest.plan.page_size.bytes


def _count_used_by_guests(guest: GuestContext) -> int:
    """The maximum number of pool pages that other guests can be using: running ones, managed or not, and stopped ones whose
    pages were not returned.
    """
    plan, ledger, hypervisor = guest.plan, guest.ledger, guest.hypervisor
    claims = [claim for claim in ledger.read().claims if claim.plan.name != plan.name]
    running, unmanaged = hypervisor.list_running(frozenset({plan.uuid, *(claim.plan.uuid for claim in claims)}))
    used = sum(
        claim.plan.pages
        for claim in claims
        if (claim.plan.node, claim.plan.page_size) == (plan.node, plan.page_size)
        and (claim.plan.uuid in running or _has_pages_record(ledger, claim.plan))
    )
    names = {claim.plan.name for claim in claims}
    # An unbound domain, or one that is bound to several nodes, may have all of its memory on this node.
    sizes = [
        domain.memory.bytes
        for domain in unmanaged
        if domain.running and domain.memory and domain.name not in names and plan.node in (domain.nodes or {plan.node})
    ]
    return used + sum(-(-size // plan.page_size.bytes) for size in sizes)


def build_placement(plan: Plan) -> Element:
    return element("numatune", element("memory", mode="strict", nodeset=str(plan.node)))


def build_backing(plan: Plan) -> Element:
    return element(
        "memoryBacking",
        element("hugepages", element("page", size=str(plan.page_size.kib), unit="KiB")),
        element("nosharepages"),
        element("locked"),
        element("allocation", mode="immediate"),
    )
