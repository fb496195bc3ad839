"""Callers: roles, tenants and their quotas."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.values import Size


class Role(StrEnum):
    OPERATOR = "operator"
    TENANT = "tenant"
    VIEWER = "viewer"


@dataclass(frozen=True)
class Quota:
    """Limits for all guests of a tenant together; None for no limit. ``cores`` are whole physical cores."""

    cores: int | None = None
    memory: Size | None = None
    vfs: int | None = None
    disks: int | None = None
    networks: int | None = None


@dataclass(frozen=True)
class Identity:
    """An authenticated caller.

    ``name`` is that of a user, token or certificate. ``tenant`` owns the caller's guests; empty for operators and viewers.
    ``boot_servers`` are URLs of folders from which a tenant's guests may boot.
    """

    name: str
    role: Role
    tenant: str = ""
    quota: Quota = Quota()
    boot_servers: tuple[str, ...] = ()


OPERATOR = Identity("operator", Role.OPERATOR)
MANAGER = Identity("manager", Role.OPERATOR)
"""The caller of events without a request."""


def may_see(caller: Identity, tenant: str) -> bool:
    return caller.role is not Role.TENANT or caller.tenant == tenant


def may_change(caller: Identity, tenant: str) -> bool:
    return caller.role is Role.OPERATOR or (caller.role is Role.TENANT and caller.tenant == tenant)
