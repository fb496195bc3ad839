"""The settings that a PF enforces for a VF: defaults for a guest, restored afterwards as far as the driver can.

Drivers differ in the defaults and in what they can set. igb takes all zeros for "no address", bnx2x refuses it (EINVAL, as for
any invalid address); mlx5 creates VFs without spoof check; some have no trust, rates or link state (EOPNOTSUPP).
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from errno import EOPNOTSUPP
from typing import Any

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.model.plan import VfPlan
from orchestrator.model.topology import VfState
from orchestrator.planning.mac import is_guest_mac
from orchestrator.resources.step import Arguments
from orchestrator.values import MacAddress


def read_vf_state(host: HostRoot, interface: str, index: int) -> VfState | None:
    """None if the PF has no such VF, or its driver does not report its settings."""
    return next((vf for vf in host.net.read_vfs(interface) if vf.index == index), None)


def configure_vf(host: HostRoot, interface: str, vf: VfPlan) -> str:
    """Sets a guest's address, port VLAN and rate, and otherwise the default settings. Returns optional settings that the driver
    cannot set.

    Raises HostError if the VF does not exist, or the driver refuses the address, the VLAN, a rate, or to remove trust.
    """
    before = read_vf_state(host, interface, vf.index)
    if before is None:
        raise HostError(f"{interface} has no VF {vf.index}", "`nohype survey` shows the VFs that exist")
    refused = host.net.enforce_vf(interface, before.with_defaults(vf.mac, vf.vlan, vf.rate))
    for name, error in refused.items():
        if name == "max_rate" and vf.rate:
            what = f"cannot limit VF {vf.index} of {interface} to {vf.rate} Mbit/s"
            hint = "omit rate, or request at most the speed of the uplink: not all drivers can limit a VF"
            raise HostError(what, hint, error.errno)
        if name == "vlan" and vf.vlan:
            what = f"cannot set port VLAN {vf.vlan} on VF {vf.index} of {interface}"
            raise HostError(what, "use an uplink whose driver supports it: ip link set IFACE vf N vlan V", error.errno)
        if name not in ("max_rate", "min_rate", "link_state") and not (name == "spoof_check" and error.errno == EOPNOTSUPP):
            raise error
    return "; ".join(error.message for error in refused.values())


def restore_vf(host: HostRoot, interface: str, wanted: VfState) -> str:
    """Returns what could not be restored. If the driver refuses zeros as "no address", the VF gets a random address.

    Raises HostError if the VF keeps the address of a guest.
    """
    current = read_vf_state(host, interface, wanted.index)
    if current is None:
        raise HostError(f"cannot restore VF {wanted.index} of {interface}: its driver does not report the VF's settings")
    # Settings that the driver does not report cannot be compared.
    wanted = replace(
        wanted,
        spoof_check=None if current.spoof_check is None else wanted.spoof_check,
        trust=None if current.trust is None else wanted.trust,
    )
    refused = host.net.enforce_vf(interface, wanted)
    notes = [error.message for name, error in refused.items() if name != "mac"]
    if "mac" in refused:
        notes.append(_replace_address(host, interface, wanted, refused["mac"]))
    return "; ".join(filter(None, notes))


def _replace_address(host: HostRoot, interface: str, wanted: VfState, refusal: HostError) -> str:
    after = read_vf_state(host, interface, wanted.index)
    if after is None:
        raise refusal
    what = f"VF {wanted.index} of {interface}"
    if after.mac and not is_guest_mac(after.mac):
        return f"{what} has the address {after.mac}: its driver refused {wanted.mac or 'zeros'}"
    mac = _choose_mac()
    refused = host.net.enforce_vf(interface, replace(after, mac=mac))
    if "mac" in refused:
        raise refused["mac"]
    return f"{what} has the random address {mac}: its driver refused {wanted.mac or 'zeros'}"


def _choose_mac() -> MacAddress:
    """A random, locally administered address (IEEE 802-2014 8.4) outside the range of guests."""
    while True:
        first, *rest = secrets.token_bytes(6)
        mac = MacAddress.parse(":".join(f"{byte:02x}" for byte in (first & 0xFC | 2, *rest)))
        if not is_guest_mac(mac):
            return mac


def state_to_json(state: VfState) -> Arguments:
    """Omits a guest's address, VLAN and rates, which a manager that lost its ledger may have left."""
    if state.mac and is_guest_mac(state.mac):
        state = replace(state, mac=None, vlan=0, qos=0, max_rate=0, min_rate=0)
    return {**{name: value for name, value in vars(state).items() if name != "index"}, "mac": str(state.mac or "")}


def state_from_json(index: int, arguments: Arguments) -> VfState:
    """Earlier versions recorded only the address: the rest has igb's defaults then."""
    mac, new = str(arguments.get("mac") or ""), VfState(index)
    rest: dict[str, Any] = {name: arguments.get(name, value) for name, value in vars(new).items() if name not in ("index", "mac")}
    return VfState(index, MacAddress.parse(mac) if mac else None, **rest)
