"""Quotas of tenants over all hosts of the fleet, checked by the command that submits. Slurm's own limits need a database server.

A guest of a tenant is submitted held, so that Slurm does not start it. It is released when it and the guests of the tenant with
lower job numbers are within the quota. Of two guests that are submitted at the same time, the one with the higher number counts
the other, so the guests that were released never exceed the quota together.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import NotFound, QuotaExceeded, RequestError
from orchestrator.fleet.slurm import Use
from orchestrator.values import NAME, Size


def _check_size(text: str) -> str:
    try:
        Size.parse(text)
    except RequestError as error:
        raise ValueError(error.message) from None
    return text


class Quota(BaseModel):
    """Limits of a tenant; None for no limit."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    cores: Annotated[int, Field(ge=0)] | None = None
    memory: Annotated[str, AfterValidator(_check_size)] | None = None  # such as "64G"
    vfs: Annotated[int, Field(ge=0)] | None = None

    @property
    def mebibytes(self) -> int | None:
        return None if self.memory is None else Size.parse(self.memory).bytes >> 20


def read_quota(path: Path, tenant: str) -> Quota:
    """Of the section [tenants.NAME] of a file in TOML.

    Raises:
        NotFound: the file does not have the tenant.
        RequestError: the file cannot be read, or a value is invalid.
    """
    if not re.fullmatch(NAME, tenant, re.ASCII):
        raise RequestError(f"{tenant!r} is not the name of a tenant", "use 1 to 40 characters of a-z, 0-9 and inner hyphens")
    try:
        tenants = tomllib.loads(path.read_text()).get("tenants", {})
    except OSError as error:
        raise RequestError(f"cannot read the quotas in {path}: {error.strerror}", "write [tenants.NAME] sections there") from None
    except ValueError as error:
        raise RequestError(f"{path} is not TOML: {error}", "see docs/fleet.md for an example") from None
    if not isinstance(tenants, dict) or tenant not in tenants:
        raise NotFound(f"{path} does not have the tenant {tenant}", f"add a section [tenants.{tenant}] with its quota")
    try:
        return Quota.model_validate(tenants[tenant])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("tenants", tenant, *first["loc"])))
        raise RequestError(f"{path}: {where}: {first['msg']}", "use cores, memory and vfs; see docs/fleet.md") from None


def check_quota(tenant: str, quota: Quota, own: Use, others: Iterable[Use]) -> None:
    """Raises QuotaExceeded, with a reason per limit, if a guest exceeds the quota together with others of its tenant."""
    uses = [own, *others]
    totals = (
        (sum(use.cores for use in uses), quota.cores, "cores"),
        (sum(use.memory for use in uses), quota.mebibytes, "MiB of memory"),
        (sum(use.vfs for use in uses), quota.vfs, "VFs"),
    )
    reasons = tuple(f"{total} of {limit} {what}" for total, limit, what in totals if limit is not None and total > limit)
    if reasons:
        hint = f"`nohype fleet list` shows the guests of tenant {tenant}: cancel one, or raise the quota"
        raise QuotaExceeded(f"quota of tenant {tenant} exceeded", reasons, hint)
