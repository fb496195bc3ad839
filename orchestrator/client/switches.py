"""The calls of `Client` about external switches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

from orchestrator.client import switch_shapes as shapes
from orchestrator.client.calls import Calls


class SwitchCalls(Calls):
    """The methods raise Forbidden for others than operators."""

    def switches(self) -> list[shapes.SwitchView]:
        """The registered external switches; contacts none."""
        found: list[shapes.SwitchView] = self._ask(list[shapes.SwitchView], "GET", "/v1/switches")
        return found

    def add_switch(self, request: Mapping[str, object]) -> shapes.SwitchView:
        """Registers a switch; the fields are those of `SwitchRequest`.

        Raises:
            RequestError: a field is invalid.
            Conflict: the name is taken.
            SwitchError: the switch cannot be reached, presents another host key, or has no such bridge.
        """
        added: shapes.SwitchView = self._ask(shapes.SwitchView, "POST", "/v1/switches", request)
        return added

    def switch(self, name: str) -> shapes.SwitchDetails:
        """Reads all ports. Raises NotFound, SwitchError."""
        found: shapes.SwitchDetails = self._ask(shapes.SwitchDetails, "GET", _switch_path(name))
        return found

    def verify_switch(self, name: str, port: str | None = None) -> list[shapes.SwitchCheck]:
        """Checks a port; None for all ports of uplinks. Raises NotFound, RequestError, SwitchError."""
        query = f"?{urlencode({'port': port})}" if port else ""
        checks: list[shapes.SwitchCheck] = self._ask(list[shapes.SwitchCheck], "GET", f"{_switch_path(name)}/verify{query}")
        return checks

    def set_hairpin(self, name: str, port: str, *, on: bool, macs: Sequence[str] = ()) -> shapes.SwitchState:
        """Sets reflective relay at a port; returns the port as it is then. Raises NotFound, SwitchError.

        Args:
            macs: the Ethernet addresses behind the port, if the driver can bind addresses.
        """
        body = {"port": port, "on": on, "macs": list(macs)}
        state: shapes.SwitchState = self._ask(shapes.SwitchState, "POST", f"{_switch_path(name)}/hairpin", body)
        return state

    def delete_switch(self, name: str, *, force: bool = False) -> None:
        """Reverts what the manager has changed on a switch, and forgets it; with ``force`` also if that fails.

        Raises NotFound, SwitchError.
        """
        self._ask(None, "DELETE", f"{_switch_path(name)}?{urlencode({'force': str(force).lower()})}")


def _switch_path(name: str) -> str:
    return f"/v1/switches/{quote(name, safe='')}"
