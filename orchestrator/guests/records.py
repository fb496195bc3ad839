"""What the manager has recorded about its guests, with which the audit compares the host."""

from __future__ import annotations

from uuid import UUID

from orchestrator.errors import NotFound
from orchestrator.ledger import Ledger
from orchestrator.model.cache import CachePlan
from orchestrator.model.core_start import CoreStart
from orchestrator.model.disk import DiskCheck
from orchestrator.model.plan import NicPlan


class Records:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def disk_checks(self, uuid: UUID) -> tuple[DiskCheck, ...] | None:
        """How the disks of a guest were verified before it got them; None without a claim."""
        names = [claim.plan.name for claim in self._ledger.read().claims if claim.plan.uuid == uuid]
        return self._ledger.disk_checks(names[0]) if names else None

    def nics(self) -> dict[UUID, tuple[NicPlan, ...]]:
        """The NICs that each guest owns."""
        return {claim.plan.uuid: claim.plan.nics for claim in self._ledger.read().claims}

    def given_texts(self, uuid: UUID) -> tuple[str, ...]:
        """The secret texts that a guest was configured with: name, hash and size of each, never the content."""
        secrets = [claim.request.secrets for claim in self._ledger.read().claims if claim.plan.uuid == uuid]
        return tuple(
            f"{name} (sha256 {secret.short_hash}, {secret.bytes} bytes)" for found in secrets for name, secret in found.items()
        )

    def caches(self, uuid: UUID) -> CachePlan | None:
        """The guest's part of the caches; None if it has requested none. Raises NotFound for a guest without a claim."""
        plans = [claim.plan for claim in self._ledger.read().claims if claim.plan.uuid == uuid]
        if not plans:
            raise NotFound("the manager has no record of what the guest requested")
        return plans[0].caches

    def core_start(self, uuid: UUID) -> CoreStart | None:
        """The counters of the guest's cores at its start; None without a record. It may be of an earlier run."""
        return self._ledger.core_start(uuid)
