"""The uplinks of the host: which edge mode guests get on each, why, and what the NIC and the external switch do now."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.errors import HostError, NotFound
from orchestrator.host.edge import SOFTWARE, describe_edge
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_pf
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import Plan, Policy
from orchestrator.model.topology import Topology
from orchestrator.model.uplink import HairpinResult, ModeView, Uplink
from orchestrator.planning.uplink import EdgeChoice, explain_no_channel, explain_no_vepa, explain_no_vfs, find_edge


def list_uplinks(host: HostRoot, topology: Topology, policy: Policy, plans: Iterable[Plan]) -> tuple[Uplink, ...]:
    """In the order of the configuration."""
    known = tuple(plans)
    return tuple(_view(host, name, topology, policy, known) for name in policy.uplinks)


def find_uplink(uplinks: Iterable[Uplink], name: str) -> Uplink:
    """Raises NotFound."""
    for uplink in uplinks:
        if uplink.name == name:
            return uplink
    raise _not_configured(name)


def prove_uplink(host: HostRoot, policy: Policy, name: str) -> HairpinResult:
    """Sends probe frames. Raises NotFound if it is not configured, HostError if it cannot send."""
    if name not in policy.uplinks:
        raise _not_configured(name)
    return host.net.probe_hairpin(name)


def _not_configured(name: str) -> NotFound:
    return NotFound(f"{name} is not an uplink of this host", "`nohype uplink list` shows the uplinks; set [host] uplinks")


def _view(host: HostRoot, name: str, topology: Topology, policy: Policy, plans: tuple[Plan, ...]) -> Uplink:
    found, interface, pf = find_edge(name, topology, policy), topology.find_interface(name), topology.find_uplink(name)
    configured = dict(policy.edges).get(name)
    return Uplink(
        name=name,
        up=interface.up if interface else bool(pf and pf.up),
        configured=str(configured or "auto"),
        edge=found.mode if isinstance(found, EdgeChoice) else None,
        why=found.why if isinstance(found, EdgeChoice) else found,
        modes=tuple(_check_modes(name, topology, policy)),
        now=_describe(host, name, topology),
        guests=tuple(plan.name for plan in plans if any(nic.interface == name for nic in plan.nics)),
    )


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
