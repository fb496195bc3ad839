"""A Linux bridge of another machine, through the programs of iproute2 over SSH."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.errors import SwitchError
from orchestrator.model.switch import FdbEntry, PortChannel, PortCounters, PortVlan, SwitchPort, SwitchState
from orchestrator.switches import bridge_channels
from orchestrator.switches.base import Capability, check_channel, check_hairpin, format_hairpin, pick_ports, refuse_addresses
from orchestrator.switches.commands import Commands, parsed, read_json
from orchestrator.switches.lldp import read_neighbour


class RemoteBridge:
    can = frozenset({Capability.HAIRPIN, Capability.CHANNELS})

    def __init__(self, bridge: str, commands: Commands) -> None:
        self.bridge, self._commands = bridge, commands

    def read(self, ports: Sequence[str] | None = None, *, neighbours: bool = False) -> SwitchState:
        commands = self._commands
        bridges = read_json(commands, ["ip", "-j", "-d", "link", "show", "type", "bridge"])
        settings = parsed(commands, "the output of `ip`", lambda: _find_settings(bridges, self.bridge))
        if settings is None:
            hint = "list the bridges of the switch with `ip link show type bridge`"
            raise SwitchError(f"there is no bridge {self.bridge} {commands.where}", hint)
        filtering, stp = bool(settings["vlan_filtering"]), bool(settings["stp_state"])
        channels = bridge_channels.read_channels(commands, self.bridge) if filtering else {}
        found = bridge_channels.merge_ports(self._read_ports(vlan_filtering=filtering), channels)
        picked = pick_ports(self.bridge, found, ports)
        if neighbours:
            picked = tuple(read_neighbour(commands, port) for port in picked)
        return SwitchState(picked, filtering, stp, None, None, None)

    def set_hairpin(self, port: str, *, on: bool, macs: Sequence[str] = ()) -> None:
        refuse_addresses(macs)
        pick_ports(self.bridge, self._read_ports(vlan_filtering=False), [port])
        self._commands.run(["bridge", "link", "set", "dev", port, "hairpin", "on" if on else "off"])
        check_hairpin(pick_ports(self.bridge, self._read_ports(vlan_filtering=False), [port])[0], on=on)

    def set_channel(self, port: str, channel: PortChannel) -> None:
        pick_ports(self.bridge, self._read_ports(vlan_filtering=False), [port])
        bridge_channels.set_channel(self._commands, self.bridge, port, channel)
        check_channel(self.read([port]).ports[0], channel)

    def remove_channel(self, port: str, vlan: int, snapshot: str) -> None:
        bridge_channels.remove_channel(self._commands, port, vlan)

    def snapshot(self, port: str) -> str:
        return format_hairpin(pick_ports(self.bridge, self._read_ports(vlan_filtering=False), [port])[0])

    def restore(self, port: str, snapshot: str) -> None:
        if port in [found.name for found in self._read_ports(vlan_filtering=False)]:
            self.set_hairpin(port, on=snapshot == "on")

    def close(self) -> None:
        self._commands.close()

    def _read_ports(self, *, vlan_filtering: bool) -> tuple[SwitchPort, ...]:
        commands = self._commands
        # iproute2 prints an empty object for each interface that it filters out itself (print_linkinfo()).
        links = read_json(commands, ["ip", "-j", "-d", "-s", "link", "show", "master", self.bridge])
        fdb = read_json(commands, ["bridge", "-j", "fdb", "show", "br", self.bridge])
        vlans = read_json(commands, ["bridge", "-j", "vlan", "show"]) if vlan_filtering else []
        ports: tuple[SwitchPort, ...] = parsed(
            commands, "the output of iproute2", lambda: tuple(_parse_port(link, fdb, vlans) for link in links if link)
        )
        return ports


def _find_settings(bridges: Any, name: str) -> Any:
    return next((link["linkinfo"]["info_data"] for link in bridges if link.get("ifname") == name), None)


def _parse_port(link: Any, fdb: Any, vlans: Any) -> SwitchPort:
    name, port, counted = link["ifname"], link["linkinfo"]["info_slave_data"], link["stats64"]
    counters = [counted[way][what] for what in ("packets", "bytes", "dropped") for way in ("rx", "tx")]
    return SwitchPort(
        name=name,
        up="UP" in link["flags"],
        carrier="LOWER_UP" in link["flags"],
        hairpin=bool(port["hairpin"]),
        state=port["state"],
        isolated=port.get("isolated"),
        mtu=link["mtu"],
        vlans=tuple(_parse_vlan(vlan) for entry in vlans if entry["ifname"] == name for vlan in entry["vlans"]),
        counters=PortCounters(*counters),
        fdb=tuple(
            FdbEntry(entry["mac"], entry.get("vlan"), entry.get("state") == "static")
            for entry in fdb
            if entry.get("ifname") == name and entry.get("state") != "permanent" and "self" not in entry.get("flags", ())
        ),
        pairs=(),
        neighbour=None,
    )


def _parse_vlan(vlan: Any) -> PortVlan:
    flags = [flag.lower() for flag in vlan.get("flags", ())]
    return PortVlan(vlan["vlan"], "pvid" in flags, "egress untagged" in flags)
