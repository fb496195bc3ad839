"""The uplinks of the host: which edge mode guests get on each, why, and what the NIC and the external switch do now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from orchestrator.errors import Conflict, Forbidden, HostError, NotFound
from orchestrator.guests.outcome import log_errors
from orchestrator.host.edge import SOFTWARE, describe_edge, find_link
from orchestrator.host.link_owner import find_owner
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_pf
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import Identity, Role
from orchestrator.model.edge import EdgeMode
from orchestrator.model.network import describe_vlans
from orchestrator.model.plan import Policy
from orchestrator.model.topology import Topology
from orchestrator.model.uplink import HairpinResult, ModeView, Uplink
from orchestrator.planning.uplink import EdgeChoice, explain_no_channel, explain_no_vepa, explain_no_vfs, find_edge


class Uplinks:
    """Serves callers. An edge mode that an operator has set here has precedence over the configuration."""

    def __init__(self, host: HostRoot, ledger: Ledger, policy: Policy) -> None:
        self._host, self._ledger, self._configured = host, ledger, policy

    @property
    def policy(self) -> Policy:
        """With the edge modes that hold now."""
        overrides = {name: edge for name, edge in self._ledger.uplink_edges().items() if name in self._configured.uplinks}
        tied = self._configured.tied | {one.uplink for switch in self._ledger.switches() for one in switch.uplinks}
        policy = self._configured if tied == self._configured.tied else replace(self._configured, tied=tied)
        return _with_edges(policy, dict(policy.edges) | overrides) if overrides else policy

    def list(self, caller: Identity, topology: Topology) -> tuple[Uplink, ...]:
        """In the order of the configuration."""
        if caller.role is Role.TENANT:
            raise Forbidden("a tenant may not see the uplinks", "ask the operator of the host")
        return tuple(self._view(name, topology) for name in self._configured.uplinks)

    def show(self, caller: Identity, name: str, topology: Topology) -> Uplink:
        """Raises NotFound."""
        for uplink in self.list(caller, topology):
            if uplink.name == name:
                return uplink
        raise _not_configured(name)

    def prove(self, caller: Identity, name: str) -> HairpinResult:
        """Sends probe frames. Raises NotFound if it is not configured, HostError if it cannot send."""
        if caller.role is not Role.OPERATOR:
            raise Forbidden(f"{caller.name} is not an operator and may not probe uplinks")
        if name not in self._configured.uplinks:
            raise _not_configured(name)
        return self._host.net.probe_hairpin(name)

    def check_access(self, caller: Identity, name: str) -> None:
        """Raises Forbidden if the caller may not set edge modes, NotFound."""
        if caller.role is not Role.OPERATOR:
            raise Forbidden(f"{caller.name} is not an operator and may not set edge modes")
        if name not in self._configured.uplinks:
            raise _not_configured(name)

    def set(self, caller: Identity, name: str, edge: str, topology: Topology) -> None:
        """No claim is made meanwhile. ``edge``: a mode, "auto", or "configured". No-op if it is set already.

        Raises Conflict if guests use the uplink, or it cannot have the mode.
        """
        overrides = self._ledger.uplink_edges()
        wanted = None if edge == "configured" else edge
        if overrides.get(name) == wanted:
            return
        if guests := self._list_guests(name):
            hint = "delete these guests first; a stopped guest keeps its NICs"
            raise Conflict(f"cannot set the edge mode of {name}: guests use the uplink: {', '.join(guests)}", hint)
        if wanted not in (None, "auto"):
            found = find_edge(name, topology, _with_edges(self._configured, dict(self._configured.edges) | {name: str(wanted)}))
            if isinstance(found, str):
                hint = f"`nohype uplink show {name}` shows the possible modes"
                raise Conflict(f"{name} cannot have edge mode {wanted}: {found}", hint)
        self._ledger.set_uplink_edge(name, wanted)
        before = overrides.get(name, "as configured")
        detail = f"edge mode {wanted or 'as configured'}, before {before}"
        log_errors(lambda: self._ledger.append_event(EventKind.UPLINK_SET, f"uplink/{name}", detail, who=caller.name))

    def _list_guests(self, name: str) -> tuple[str, ...]:
        plans = (claim.plan for claim in self._ledger.read().claims)
        return tuple(plan.name for plan in plans if any(nic.interface == name for nic in plan.nics))

    def _list_gaps(self, name: str) -> tuple[str, ...]:
        nics = (nic for claim in self._ledger.read().claims for nic in claim.plan.nics if nic.interface == name)
        if vlans := frozenset(nic.vlan for nic in nics if nic.vlan and nic.edge is not EdgeMode.CHANNEL):
            # To receive them the PF would have to join these VLANs: the host would receive the tenants' broadcasts.
            return (f"whether frames of VLANs {describe_vlans(vlans)} return: the manager's probe frames have no tag",)
        return ()

    def _view(self, name: str, topology: Topology) -> Uplink:
        policy, interface, pf = self.policy, topology.find_interface(name), topology.find_uplink(name)
        found = find_edge(name, topology, policy)
        return Uplink(
            name=name,
            up=interface.up if interface else bool(pf and pf.up),
            configured=str(dict(self._configured.edges).get(name, "auto")),
            edge=found.mode if isinstance(found, EdgeChoice) else None,
            why=found.why if isinstance(found, EdgeChoice) else found,
            modes=tuple(_check_modes(name, topology, policy)),
            now=_describe(self._host, name, topology),
            guests=self._list_guests(name),
            override=self._ledger.uplink_edges().get(name, ""),
            managed_by=_find_owner(self._host, name),
            gaps=self._list_gaps(name),
        )


def _with_edges(policy: Policy, edges: Mapping[str, str]) -> Policy:
    return replace(policy, edges=tuple((name, EdgeMode(edge)) for name, edge in edges.items() if edge != "auto"))


def _not_configured(name: str) -> NotFound:
    return NotFound(f"{name} is not an uplink of this host", "`nohype uplink list` shows the uplinks; set [host] uplinks")


def _find_owner(host: HostRoot, name: str) -> str:
    try:
        link = find_link(host, name)
    except HostError:
        return ""
    return (find_owner(host, link.index) or "") if link else ""


def _check_modes(name: str, topology: Topology, policy: Policy) -> Iterable[ModeView]:
    yield ModeView(EdgeMode.VEPA, explain_no_vfs(name, topology) or explain_no_vepa(name, topology))
    yield ModeView(EdgeMode.CHANNEL, explain_no_channel(name, topology, policy))
    interface = topology.find_interface(name)
    for mode, edge in SOFTWARE.items():
        yield ModeView(mode, edge.check_uplink(interface) if interface else f"there is no Ethernet interface {name}")


def _describe(host: HostRoot, name: str, topology: Topology) -> str:
    """What the NIC does between its VFs now; empty without VFs."""
    pf = topology.find_uplink(name)
    if pf is None or not pf.vfs:
        return ""
    try:
        return describe_edge(host, read_pf(host, pf.address, [name]))
    except HostError as error:
        return error.message
