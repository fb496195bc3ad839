"""VF settings of a PF: address, VLAN, rate, trust, spoof check, link state."""

from __future__ import annotations

from collections.abc import Iterable
from errno import EINVAL, ENODEV, EOPNOTSUPP
from typing import Any

from orchestrator.errors import HostError
from orchestrator.host.netlink.sockets import (
    NO_MAC,
    RTEXT_FILTER_SKIP_STATS,
    RTEXT_FILTER_VF,
    find_index,
    opened,
    parse_mac,
)
from orchestrator.model.topology import VfState

_UNKNOWN = 0xFFFF_FFFF
_VF_LINK_STATES = {0: "auto", 1: "enable", 2: "disable"}


def read_vfs(interface: str) -> tuple[VfState, ...]:
    """Empty if there are no VFs or the driver does not report them. HostError has EMSGSIZE if one message cannot hold all."""
    what = f"read the VFs of {interface}"
    with opened(what) as ipr:
        return _read_vfs(ipr, find_index(ipr, interface, what))


def enforce_vf(interface: str, wanted: VfState) -> dict[str, HostError]:
    """Returns the settings that the driver refused or ignored, by attribute of `VfState`.

    A bound VF driver uses a new address after its next reset. Address None is written as zeros, which some drivers refuse.
    Raises HostError if the interface (ENODEV) or the VF (EINVAL) does not exist.
    """
    # One request per changed attribute: many drivers do not support all attributes.
    what = f"set VF {wanted.index} of {interface}"
    hint = f"not supported by the driver; some need link on {interface} first"
    with opened(what) as ipr:
        index = find_index(ipr, interface, what)
        before = _find_vf(_read_vfs(ipr, index), interface, wanted.index, what)
    refused: dict[str, HostError] = {}
    for name, attribute, value in _list_changes(before, wanted):
        try:
            with opened(f"{what}: {attribute} {value}", None, {EINVAL: hint, EOPNOTSUPP: hint}) as ipr:
                ipr.link("set", index=index, vf={"vf": wanted.index, attribute: value})
        except HostError as error:
            if error.errno == ENODEV:
                raise
            refused[name] = error
    with opened(what) as ipr:
        after = _find_vf(_read_vfs(ipr, index), interface, wanted.index, what)
    for name, difference in after.diff(wanted).items():
        refused.setdefault(name, HostError(f"VF {wanted.index} of {interface}: settings not applied: {difference}"))
    return refused


def _read_vfs(ipr: Any, index: int) -> tuple[VfState, ...]:
    # Of one interface: a dump of all interfaces fails for all if one PF has too many VFs.
    (message,) = ipr.link("get", index=index, ext_mask=RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS)
    return _parse_vfs(message)


def _parse_vfs(message: Any) -> tuple[VfState, ...]:
    vfs = message.get_attr("IFLA_VFINFO_LIST")
    found = tuple(map(_parse_vf, vfs.get_attrs("IFLA_VF_INFO"))) if vfs is not None else ()
    total = message.get_attr("IFLA_NUM_VF") or 0
    if found and len(found) != total:
        raise LookupError(f"{len(found)} of {total} VFs")
    return found


def _find_vf(vfs: Iterable[VfState], interface: str, index: int, what: str) -> VfState:
    for vf in vfs:
        if vf.index == index:
            return vf
    raise HostError(f"cannot {what}", f"{interface} has no VF {index}", EINVAL)


def _list_changes(before: VfState, after: VfState) -> list[tuple[str, str, object]]:
    """(attribute of VfState, pyroute2's name, value) per difference. The address is last: a trusted VF can still change it."""
    rates = {"min_tx_rate": after.min_rate, "max_tx_rate": after.max_rate}
    link_states = {name: number for number, name in _VF_LINK_STATES.items()}
    changes: list[tuple[str, str, object]] = []
    if before.trust != after.trust:
        changes.append(("trust", "trust", int(bool(after.trust))))
    if before.spoof_check != after.spoof_check:
        changes.append(("spoof_check", "spoofchk", int(bool(after.spoof_check))))
    if (before.vlan, before.qos) != (after.vlan, after.qos):
        changes.append(("vlan", "vlan", {"vlan": after.vlan, "qos": after.qos}))
    if (before.min_rate, before.max_rate) != (after.min_rate, after.max_rate):
        changes.append(("max_rate", "rate", rates))
    if before.link_state != after.link_state:
        changes.append(("link_state", "link_state", link_states[after.link_state]))
    if before.mac != after.mac:
        changes.append(("mac", "mac", str(after.mac or NO_MAC)))
    return changes


def _parse_vf(info: Any) -> VfState:
    def field(attribute: str, key: str) -> int:
        value = info.get_attr(attribute)
        return int(value[key]) if value is not None else 0

    def flag(attribute: str, key: str) -> bool | None:
        # All ones if the driver does not report it (rtnl_fill_vfinfo(), -1).
        value = info.get_attr(attribute)
        return None if value is None or int(value[key]) == _UNKNOWN else bool(value[key])

    address = info.get_attr("IFLA_VF_MAC")
    return VfState(
        index=int(address["vf"]),
        mac=parse_mac(address["mac"]),
        vlan=field("IFLA_VF_VLAN", "vlan"),
        qos=field("IFLA_VF_VLAN", "qos"),
        min_rate=field("IFLA_VF_RATE", "min_tx_rate"),
        max_rate=field("IFLA_VF_RATE", "max_tx_rate"),
        spoof_check=flag("IFLA_VF_SPOOFCHK", "spoofchk"),
        trust=flag("IFLA_VF_TRUST", "trust"),
        link_state=_VF_LINK_STATES.get(field("IFLA_VF_LINK_STATE", "link_state"), "auto"),
    )
