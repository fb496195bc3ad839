"""Checks a tenant's quota. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.errors import QuotaExceeded
from orchestrator.model.access import Identity, Role
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.model.secret import MAX_USER_DATA
from orchestrator.values import Size

MAX_SECRETS = 64 * MAX_USER_DATA
"""Bytes of secret texts that the host stores for a tenant."""


def check_quota(caller: Identity, request: GuestRequest, cores: int, owned: Sequence[Plan]) -> None:
    """Raises QuotaExceeded, with a reason per limit, if the request with ``cores`` cores exceeds the caller's quota."""
    quota, reasons = caller.quota, []
    total_cores = cores + sum(len(plan.cores) for plan in owned)
    total_memory = request.size.bytes + sum(plan.memory.bytes for plan in owned)
    total_vfs = len(request.wanted_nics) + sum(len(plan.nics) for plan in owned)
    if quota.cores is not None and total_cores > quota.cores:
        reasons.append(f"{total_cores} of {quota.cores} cores")
    if quota.memory is not None and total_memory > quota.memory.bytes:
        reasons.append(f"{Size(total_memory)} of {quota.memory} memory")
    if quota.vfs is not None and total_vfs > quota.vfs:
        reasons.append(f"{total_vfs} of {quota.vfs} VFs")
    total_disks = len(request.disks) + sum(len(plan.disks) for plan in owned)
    if quota.disks is not None and total_disks > quota.disks:
        reasons.append(f"{total_disks} of {quota.disks} disks")
    if reasons:
        subject = f"tenant {caller.tenant} with guest {request.name!r}"
        hint = "delete a guest, or ask the operator for a larger quota"
        raise QuotaExceeded("quota exceeded", tuple(f"{subject}: {reason}" for reason in reasons), hint)


def check_secrets(caller: Identity, request: GuestRequest, owned: Sequence[GuestRequest]) -> None:
    """Raises QuotaExceeded if the secret texts of all guests of a tenant, with those of the request, are too large."""
    total = sum(secret.bytes for one in (*owned, request) for secret in one.secrets.values())
    if caller.role is Role.TENANT and total > MAX_SECRETS:
        reason = f"tenant {caller.tenant} with guest {request.name!r}: {total} of {MAX_SECRETS} bytes of user data"
        raise QuotaExceeded("quota exceeded", (reason,), "delete a guest, or send less user data")
