"""Records what had happened on a guest's cores when it was started, with which the audit compares later counts."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.errors import HostError
from orchestrator.host.core_counts import read_core_start, read_start_time
from orchestrator.host.processes import read_boot_id
from orchestrator.host.root import HostRoot
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Plan
from orchestrator.values import CpuSet


def record_start(host: HostRoot, ledger: Ledger, plan: Plan, pid: int) -> None:
    """Of a guest whose vCPUs were just let run. Raises HostError, LedgerError."""
    _record(host, ledger, plan, pid, at_launch=True)


def record_adopted(host: HostRoot, ledger: Ledger, plan: Plan, pid: int, prepare: Callable[[], object]) -> None:
    """Of a guest that runs already; no-op if this run of it has a record. ``prepare`` is called before a reading."""
    known = ledger.core_start(plan.uuid)
    if known and known.run == (read_boot_id(host), pid, read_start_time(host, pid)):
        return
    prepare()
    _record(host, ledger, plan, pid, at_launch=False)


def _record(host: HostRoot, ledger: Ledger, plan: Plan, pid: int, *, at_launch: bool) -> None:
    try:
        start = read_core_start(host, pid, CpuSet.of(plan.cpus), at_launch=at_launch)
    except HostError as error:
        raise HostError(f"guest {plan.name}: counters of its cores are not recorded: {error.message}", error.hint) from None
    ledger.record_core_start(plan, start)
