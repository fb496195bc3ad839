"""The manager's functions for tenant networks: access and views. `planning.network` decides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from orchestrator.errors import Conflict, Forbidden
from orchestrator.guests.outcome import log_errors
from orchestrator.guests.refusals import RefusalLog
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import Identity, may_change, may_see
from orchestrator.model.network import Network, NetworkRequest, NetworkView
from orchestrator.model.plan import Policy
from orchestrator.planning.network import check_access, find_network, plan_network


class Networks:
    """Serves callers. Methods raise NotFound for a network that the caller may not see."""

    def __init__(self, ledger: Ledger, policy: Policy, refusals: RefusalLog) -> None:
        self._ledger, self._policy, self._refusals = ledger, policy, refusals

    def list(self, caller: Identity) -> tuple[NetworkView, ...]:
        return tuple(self._view(caller, one) for one in self._ledger.networks().values() if may_see(caller, one.owner))

    def show(self, caller: Identity, name: str) -> NetworkView:
        return self._view(caller, find_network(caller, name, self._ledger.networks()))

    def create(self, caller: Identity, request: NetworkRequest) -> tuple[NetworkView, bool]:
        """Returns the existing network and False if it is the same. Raises as `check_access` and `plan_network`."""
        check_access(caller, request)
        with self._refusals.logging(_subject(request.name), caller):
            network, new = self._ledger.create_network(lambda known: plan_network(caller, request, known, self._policy))
        if new:
            self._note(EventKind.NETWORK_CREATED, caller, network)
        return self._view(caller, network), new

    def delete(self, caller: Identity, name: str) -> None:
        """Raises Conflict with the names of its guests if there are any."""
        network = find_network(caller, name, self._ledger.networks())
        if not may_change(caller, network.owner):
            raise Forbidden(f"{caller.name} may not delete networks")
        self._ledger.delete_network(network, partial(self._refuse_if_used, caller, network))
        self._note(EventKind.NETWORK_DELETED, caller, network)

    def _note(self, kind: EventKind, caller: Identity, network: Network) -> None:
        """An event that cannot be written does not make a completed change an error."""
        subject, detail = _subject(network.name), f"VLAN {network.vlan}"
        log_errors(lambda: self._ledger.append_event(kind, subject, detail, who=caller.name, tenant=network.owner))

    def _refuse_if_used(self, caller: Identity, network: Network, guests: Sequence[str]) -> None:
        seen = self._view(caller, network).guests
        hidden = len(guests) - len(seen)
        names = [*seen, *([f"{hidden} of the operator"] if hidden else [])]
        if names:
            hint = "delete these guests first; a stopped guest keeps its networks"
            raise Conflict(f"network {network.name} is in use by guests: {', '.join(names)}", hint)

    def _view(self, caller: Identity, network: Network) -> NetworkView:
        claims = [claim for claim in self._ledger.read().claims if may_see(caller, claim.owner)]
        guests = (claim.plan.name for claim in claims if any(nic.network == network.name for nic in claim.plan.nics))
        return NetworkView(network, tuple(guests))


def _subject(name: str) -> str:
    """Of events: differs from every guest's name."""
    return f"network/{name}"
