"""Callers: roles, tenants and their quotas."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.values import Size


class Role(StrEnum):
    """An operator may do everything, a tenant read and change its own guests, a viewer read everything."""

    OPERATOR = "operator"
    TENANT = "tenant"
    VIEWER = "viewer"


@dataclass(frozen=True)
class Quota:
    """Maximum of all guests of a tenant together; None for no limit.

    Attributes:
        cores: whole physical cores.
        vfs: virtual functions, and so guests: each has one.
    """

    cores: int | None = None
    memory: Size | None = None
    vfs: int | None = None


@dataclass(frozen=True)
class Identity:
    """An authenticated caller.

    Attributes:
        name: for the event log: name of a user, token or certificate.
        tenant: owner of its guests; empty for the host's own (operators and viewers).
    """

    name: str
    role: Role
    tenant: str = ""
    quota: Quota = Quota()


OPERATOR = Identity("operator", Role.OPERATOR)
MANAGER = Identity("manager", Role.OPERATOR)
"""The caller of events without a request."""


def may_see(caller: Identity, tenant: str) -> bool:
    """Whether a caller may know of a guest of a tenant ("" for the host's own)."""
    return caller.role is not Role.TENANT or caller.tenant == tenant


def may_change(caller: Identity, tenant: str) -> bool:
    return caller.role is Role.OPERATOR or (caller.role is Role.TENANT and caller.tenant == tenant)
