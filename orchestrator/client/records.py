"""The calls of `Client` about the host as a whole, signed evidence and the hash chain of the event log."""

from __future__ import annotations

from urllib.parse import urlencode

from orchestrator.client import host_shapes, shapes
from orchestrator.client.calls import Calls

_AUDIT = 600.0


class RecordCalls(Calls):
    def host(self) -> host_shapes.Host:
        """The host at one moment: who has what of it, what runs, and what needs attention. Raises Forbidden for tenants."""
        host: host_shapes.Host = self._ask(host_shapes.Host, "GET", "/v1/host")
        return host

    def audit(self, frames: int = 0, *, host_only: bool = False) -> list[shapes.Proof]:
        """Measures all proofs, or with ``host_only`` only those of the host. Raises Forbidden for tenants.

        ``frames``: test frames between guests for `vepa`; more than 0 requires the operator role.
        """
        query = urlencode({"frames": frames, "host_only": str(host_only).lower()})
        proofs: list[shapes.Proof] = self._ask(list[shapes.Proof], "GET", f"/v1/audit?{query}", timeout=_AUDIT)
        return proofs

    def evidence(self, frames: int = 0, nonce: str = "") -> shapes.SignedEvidence:
        """Measures all proofs and signs them with the key of the host. ``nonce`` is repeated in the evidence.

        Raises HostError if the manager has no signing key that it can use, Forbidden for tenants.
        """
        query = urlencode({"frames": frames, "nonce": nonce})
        signed: shapes.SignedEvidence = self._ask(shapes.SignedEvidence, "GET", f"/v1/evidence?{query}", timeout=_AUDIT)
        return signed

    def event_chain(self, at: int | None = None) -> shapes.EventChain:
        """Verifies the event log. ``at``: an event whose hash to return. Raises Forbidden for tenants."""
        target = "/v1/events/chain" if at is None else f"/v1/events/chain?at={at:d}"
        chain: shapes.EventChain = self._ask(shapes.EventChain, "GET", target, timeout=_AUDIT)
        return chain
