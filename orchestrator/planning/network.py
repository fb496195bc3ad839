"""Decides on a request for a tenant network, and which uplinks carry a network. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import Conflict, Forbidden, NoRoom, NotFound, QuotaExceeded, RequestError
from orchestrator.model.access import Identity, Role, may_change, may_see
from orchestrator.model.network import Network, NetworkRequest, describe_vlans
from orchestrator.model.plan import Policy

Networks = Mapping[str, Network]
"""By name."""
_LIST = "`nohype network list` shows the networks"


def find_network(caller: Identity, name: str, known: Networks) -> Network:
    """Raises NotFound if the network does not exist, or belongs to another tenant than the caller's."""
    network = known.get(name)
    if network is None or not may_see(caller, network.owner):
        raise NotFound(f"there is no network named {name}", _LIST)
    return network


def plan_network(caller: Identity, request: NetworkRequest, known: Networks, policy: Policy) -> Network:
    """The network that the request describes: the existing one if it is the same, otherwise a new one.

    The caller has access (`check_access`).

    Raises:
        RequestError: the owner is not a tenant of this host, or no uplink carries the VLAN.
        Conflict: the name or the VLAN is taken.
        QuotaExceeded: the tenant has too many networks.
        NoRoom: no VLAN is free.
    """
    owner = _choose_owner(caller, request)
    if existing := known.get(request.name):
        return _check_same(caller, request, owner, existing)
    if owner and owner not in policy.tenants and caller.role is Role.OPERATOR:
        raise RequestError(f"there is no tenant named {owner}", "add [tenants.NAME] to the configuration, or correct the name")
    owned = sum(network.owner == owner for network in known.values())
    limit = caller.quota.networks
    if caller.role is Role.TENANT and limit is not None and owned >= limit:
        reason = f"tenant {owner} with network {request.name!r}: {owned + 1} of {limit} networks"
        raise QuotaExceeded("quota exceeded", (reason,), "delete a network, or ask the operator for a larger quota")
    return Network(request.name, _choose_vlan(caller, request, known, policy), owner)


def explain_not_carried(policy: Policy, uplink: str, network: Network) -> str:
    """The reason why guests cannot join the network through this uplink; empty if they can."""
    if network.vlan in policy.channels.get(uplink, ()):
        return f"it keeps VLAN {network.vlan} of network {network.name} for single guests ([uplinks.{uplink}] channels)"
    vlans = policy.vlans.get(uplink)
    if vlans is None or network.vlan in vlans:
        return ""
    return f"it does not carry VLAN {network.vlan} of network {network.name} ([uplinks.{uplink}] vlans = {describe_vlans(vlans)})"


def check_access(caller: Identity, request: NetworkRequest) -> None:
    """Raises Forbidden if the caller may not create networks of this owner, or not choose the VLAN."""
    owner = _choose_owner(caller, request)
    if not may_change(caller, owner):
        raise Forbidden(f"{caller.name} may not create networks" + (f" of tenant {owner}" if owner != caller.tenant else ""))
    if request.vlan is not None and caller.role is not Role.OPERATOR:
        # A tenant could otherwise join a VLAN of the switch that does not belong to it.
        raise Forbidden(f"{caller.name} is not an operator and may not choose a VLAN", "omit vlan: a free VLAN is chosen")


def _choose_owner(caller: Identity, request: NetworkRequest) -> str:
    return caller.tenant if request.owner is None else request.owner


def _check_same(caller: Identity, request: NetworkRequest, owner: str, existing: Network) -> Network:
    if (existing.owner, request.vlan or existing.vlan) == (owner, existing.vlan):
        return existing
    if not may_see(caller, existing.owner):
        raise Conflict(f"the name {request.name} is taken", "choose another name")
    of = f"of tenant {existing.owner}" if existing.owner else "of the host"
    raise Conflict(f"there is a network {request.name} {of} with VLAN {existing.vlan}", "choose another name, or delete it first")


def _choose_vlan(caller: Identity, request: NetworkRequest, known: Networks, policy: Policy) -> int:
    used = {network.vlan: network.name for network in known.values()}
    wanted = request.vlan
    if wanted is None:
        ranges = frozenset[int]().union(*policy.vlans.values())
        if free := ranges - used.keys():
            return min(free)
        reason = f"all of VLANs {describe_vlans(ranges)} are used by networks" if ranges else "no uplink has a range of VLANs"
        hint = "ask the operator of the host" if caller.role is Role.TENANT else "set [uplinks.NAME] vlans, or choose with --vlan"
        raise NoRoom(f"no VLAN for network {request.name!r}", (reason,), hint)
    if wanted in used:
        raise Conflict(f"VLAN {wanted} is used by network {used[wanted]}", f"choose another VLAN; {_LIST}")
    new = Network(request.name, wanted)
    refused = [reason for uplink in policy.uplinks if (reason := explain_not_carried(policy, uplink, new))]
    if len(refused) == len(policy.uplinks):
        carried = frozenset[int]().union(*policy.vlans.values())
        hint = "choose a VLAN that is not listed in [uplinks.NAME] channels"
        if carried:
            hint = f"choose one of {describe_vlans(carried)}, or extend [uplinks.NAME] vlans"
        raise RequestError(f"no uplink carries VLAN {wanted}", hint)
    return wanted
