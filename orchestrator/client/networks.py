"""The calls of `Client` about uplinks and tenant networks."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from orchestrator.client import shapes
from orchestrator.client.calls import Calls


class NetworkCalls(Calls):
    def uplinks(self) -> list[shapes.Uplink]:
        """Raises Forbidden for tenants."""
        uplinks: list[shapes.Uplink] = self._ask(list[shapes.Uplink], "GET", "/v1/uplinks")
        return uplinks

    def uplink(self, name: str) -> shapes.Uplink:
        """Raises NotFound if it is not configured, Forbidden for tenants."""
        uplink: shapes.Uplink = self._ask(shapes.Uplink, "GET", f"/v1/uplinks/{quote(name, safe='')}")
        return uplink

    def set_uplink(self, name: str, edge: str) -> shapes.Uplink:
        """Sets the mode of new guests: also "auto" or "configured". Raises NotFound, Forbidden, Conflict while guests use it."""
        uplink: shapes.Uplink = self._ask(shapes.Uplink, "POST", f"/v1/uplinks/{quote(name, safe='')}/edge", {"edge": edge})
        return uplink

    def prove_uplink(self, name: str) -> shapes.HairpinResult:
        """Probes whether the external switch sends frames back to the uplink. Raises NotFound, Forbidden, HostError."""
        result: shapes.HairpinResult = self._ask(shapes.HairpinResult, "POST", f"/v1/uplinks/{quote(name, safe='')}/prove")
        return result

    def networks(self) -> list[shapes.Network]:
        """All networks that the caller may see."""
        networks: list[shapes.Network] = self._ask(list[shapes.Network], "GET", "/v1/networks")
        return networks

    def network(self, name: str) -> shapes.Network:
        """Raises NotFound if the network does not exist or belongs to another tenant."""
        network: shapes.Network = self._ask(shapes.Network, "GET", f"/v1/networks/{quote(name, safe='')}")
        return network

    def create_network(self, request: Mapping[str, object]) -> shapes.Network:
        """Creates a network; the fields are those of `NetworkRequest`. Repeating a request changes nothing.

        Raises:
            RequestError: a field is invalid, or no uplink carries the VLAN.
            Conflict: the name or the VLAN is taken.
            NoRoom, QuotaExceeded: ``reasons`` lists why.
        """
        made: shapes.Network = self._ask(shapes.Network, "POST", "/v1/networks", request)
        return made

    def delete_network(self, name: str) -> None:
        """Raises NotFound, and Conflict while guests use the network."""
        self._ask(None, "DELETE", f"/v1/networks/{quote(name, safe='')}")
