"""Translates VLANs of guests at a port of a Linux bridge: each becomes a port of its own, with the VLAN of its network as PVID.

A VLAN interface on the port takes the frames of its VLAN before the bridge does (__netif_receive_skb_core()), without their
tag. The bridge must filter VLANs: otherwise another station could send into a guest's VLAN through the port itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from orchestrator.errors import SwitchError
from orchestrator.model.switch import PortChannel, SwitchPort
from orchestrator.switches.commands import Commands, parsed, read_json

_NAME = re.compile(r"nhc\d+\.(\d+)", re.ASCII)


def is_channel(interface: str) -> bool:
    """Whether the manager has created this interface for a guest's VLAN, by its name."""
    return bool(_NAME.fullmatch(interface))


def read_channels(commands: Commands, bridge: str) -> dict[str, tuple[PortChannel, ...]]:
    """By port of the bridge, the VLANs that are translated there."""
    links = read_json(commands, ["ip", "-j", "-d", "link", "show", "type", "vlan"])
    if not any(is_channel(str(link.get("ifname"))) for link in links):
        return {}
    vlans = read_json(commands, ["bridge", "-j", "vlan", "show"])
    found: dict[str, tuple[PortChannel, ...]] = parsed(commands, "the VLANs", lambda: _group(_parse(links, vlans, bridge)))
    return found


def merge_ports(ports: Iterable[SwitchPort], channels: Mapping[str, tuple[PortChannel, ...]]) -> tuple[SwitchPort, ...]:
    """The ports of the bridge with the VLANs that are translated there; the interfaces of these VLANs are not listed."""
    return tuple(replace(port, channels=channels.get(port.name, ())) for port in ports if not is_channel(port.name))


def set_channel(commands: Commands, bridge: str, port: str, channel: PortChannel) -> None:
    """Replaces an earlier translation of the VLAN. Raises SwitchError if the bridge cannot translate."""
    untagged = _list_pvids_of(commands, port)
    if channel.switch_vlan and channel.switch_vlan in untagged:
        hint = f"choose another VLAN for the network, or run `bridge vlan add dev {port} vid NUMBER pvid untagged` on the switch"
        raise SwitchError(f"VLAN {channel.switch_vlan} is that of untagged frames (PVID) at port {port} of bridge {bridge}", hint)
    inside = channel.switch_vlan or _pick_pvid(port, untagged)
    _check_bridge(commands, bridge, port, channel.vlan)
    name = _choose_name(commands, port, channel.vlan)
    _remove(commands, name)
    commands.run(["ip", "link", "add", "link", port, "name", name, "type", "vlan", "id", str(channel.vlan)])
    try:
        commands.run(["ip", "link", "set", "dev", name, "master", bridge])
        for vlan in _list_vlans(commands, name):
            commands.run(["bridge", "vlan", "del", "dev", name, "vid", str(vlan)])
        commands.run(["bridge", "vlan", "add", "dev", name, "vid", str(inside), "pvid", "untagged"])
        # Only the guest's address is behind it. It need not be learned, and no other guest's frames are flooded to it.
        commands.run(["bridge", "link", "set", "dev", name, "learning", "off", "flood", "off"])
        commands.run(["bridge", "fdb", "replace", channel.mac, "dev", name, "master", "static", "vlan", str(inside)])
        commands.run(["ip", "link", "set", "dev", name, "up"])
    except SwitchError:
        _remove(commands, name)
        raise


def remove_channel(commands: Commands, port: str, vlan: int) -> None:
    """No-op if it does not exist."""
    if _find_link(commands, port):
        _remove(commands, _choose_name(commands, port, vlan))


def _parse(links: Any, vlans: Any, bridge: str) -> Iterator[tuple[str, PortChannel]]:
    inside = {entry["ifname"]: _list_pvids(entry) for entry in vlans}
    for link in links:
        if link and is_channel(link["ifname"]) and link.get("master") == bridge and "UP" in link["flags"]:
            port, pvids = link["link"], inside.get(link["ifname"], [])
            own = inside.get(port, [])
            if pvids:
                yield port, PortChannel(link["linkinfo"]["info_data"]["id"], "", 0 if pvids == own else pvids[0])


def _list_pvids(entry: Any) -> list[int]:
    return [vlan["vlan"] for vlan in entry["vlans"] if "PVID" in vlan.get("flags", ())]


def _group(found: Iterable[tuple[str, PortChannel]]) -> dict[str, tuple[PortChannel, ...]]:
    result: dict[str, tuple[PortChannel, ...]] = {}
    for port, channel in sorted(found, key=lambda one: (one[0], one[1].vlan)):
        result[port] = (*result.get(port, ()), channel)
    return result


def _check_bridge(commands: Commands, bridge: str, port: str, vlan: int) -> None:
    settings = read_json(commands, ["ip", "-j", "-d", "link", "show", "dev", bridge])
    if not parsed(commands, "the output of `ip`", lambda: settings[0]["linkinfo"]["info_data"]["vlan_filtering"]):
        hint = f"run `ip link set {bridge} type bridge vlan_filtering 1` on the switch"
        raise SwitchError(f"bridge {bridge} does not filter VLANs: it cannot translate those of guests", hint)
    if vlan in _list_vlans(commands, port):
        hint = f"run `bridge vlan del dev {port} vid {vlan}` on the switch, or choose other [uplinks.NAME] channels"
        raise SwitchError(f"port {port} of bridge {bridge} is in VLAN {vlan}, which is to be translated", hint)


def _list_pvids_of(commands: Commands, port: str) -> list[int]:
    """The VLAN of untagged frames of the port, if it has one."""
    entries = read_json(commands, ["bridge", "-j", "vlan", "show", "dev", port])
    found: list[int] = parsed(commands, "the VLANs", lambda: [vlan for entry in entries for vlan in _list_pvids(entry)])
    return found


def _pick_pvid(port: str, found: list[int]) -> int:
    if not found:
        hint = f"run `bridge vlan add dev {port} vid NUMBER pvid untagged` on the switch"
        raise SwitchError(f"port {port} has no VLAN for untagged frames (PVID)", hint)
    return found[0]


def _list_vlans(commands: Commands, port: str) -> list[int]:
    entries = read_json(commands, ["bridge", "-j", "vlan", "show", "dev", port])

    def build() -> list[int]:
        ranges = [(one["vlan"], one.get("vlanEnd", one["vlan"])) for entry in entries for one in entry["vlans"]]
        return [vlan for first, last in ranges for vlan in range(first, last + 1)]

    found: list[int] = parsed(commands, "the VLANs", build)
    return found


def _choose_name(commands: Commands, port: str, vlan: int) -> str:
    """Of the port's number: the names of two long ports may differ only in their ends."""
    link = _find_link(commands, port)
    number = parsed(commands, "the output of `ip`", lambda: int(link["ifindex"]) if link else None)
    if number is None or number > 9_999_999:
        hint = "check the number of the port with `ip link`"
        raise SwitchError(f"cannot name the interface for VLAN {vlan} of port {port}", hint)
    return f"nhc{number}.{vlan}"


def _find_link(commands: Commands, name: str) -> Any:
    return next((link for link in read_json(commands, ["ip", "-j", "link", "show"]) if link.get("ifname") == name), None)


def _remove(commands: Commands, name: str) -> None:
    if _find_link(commands, name):
        commands.run(["ip", "link", "del", "dev", name])
