"""Who asks, and what they may do: roles, tenants and their quotas. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.values import Size


class Role(StrEnum):
    """What somebody may do: an operator everything; a tenant see and change the own guests; a viewer see everything."""

    OPERATOR = "operator"
    TENANT = "tenant"
    VIEWER = "viewer"


@dataclass(frozen=True)
class Quota:
    """The most that all guests of a tenant together may own; None for no bound.

    Attributes:
        cores: whole physical cores.
        memory: bytes of huge pages.
        vfs: virtual functions, which are guests too: each has one.
    """

    cores: int | None = None
    memory: Size | None = None
    vfs: int | None = None


@dataclass(frozen=True)
class Identity:
    """Somebody who asks the manager for something.

    Attributes:
        name: for the event log: "root", a user's, a token's or a certificate's name.
        tenant: whose guests these are; empty for the host's own (operators and viewers).
        quota: bounds of the tenant.
    """

    name: str
    role: Role
    tenant: str = ""
    quota: Quota = Quota()


OPERATOR = Identity("operator", Role.OPERATOR)
MANAGER = Identity("manager", Role.OPERATOR)
"""The manager itself, in the event log: what it does without having been asked."""


def may_see(who: Identity, owner: str) -> bool:
    """Whether somebody may know of a guest that belongs to the tenant ``owner`` ("" for the host's own)."""
    return who.role is not Role.TENANT or who.tenant == owner


def may_change(who: Identity, owner: str) -> bool:
    """Whether somebody may change a guest that belongs to the tenant ``owner``."""
    return who.role is Role.OPERATOR or (who.role is Role.TENANT and who.tenant == owner)
