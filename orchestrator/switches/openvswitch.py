"""Open vSwitch as external switch, through its own programs on this host or over SSH.

A bridge reflects by flows, which are lost when ovs-vswitchd restarts. With fail-mode=secure nothing passes then; in standalone
mode the switch forwards without reflecting, which is not visible outside the host.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import SwitchError
from orchestrator.model.switch import FdbEntry, PortChannel, PortCounters, PortVlan, SwitchPort, SwitchState
from orchestrator.switches import relay_table
from orchestrator.switches.base import Capability, check_channel, check_hairpin, pick_ports
from orchestrator.switches.commands import Commands, parsed, read_json
from orchestrator.switches.lldp import read_neighbour
from orchestrator.switches.relay_table import Flow, Relay

_TIMEOUT = "--timeout=5"  # seconds; without it, ovs-vsctl waits for ovs-vswitchd indefinitely
_SECURE = "secure"
_FAIL_MODE, _NORMAL = "nohype-fail-mode", "nohype-normal"
"""In external_ids of a bridge with our table: what was before it. Those who use the table end in any order."""
_UNSET = "unset"
_COUNTERS = ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes", "rx_dropped", "tx_dropped")


@dataclass(frozen=True)
class _Before:
    """The port before a change, and the bridge before its first one. ``fail_mode``: empty if it is not set."""

    on: bool
    macs: tuple[str, ...]
    has_table: bool
    fail_mode: str
    normal: bool  # the bridge had its default flow


class OpenVSwitch:
    can = frozenset({Capability.HAIRPIN, Capability.CHANNELS, Capability.BINDING, Capability.PAIR_COUNTERS})

    def __init__(self, bridge: str, commands: Commands) -> None:
        self.bridge, self._commands = bridge, commands

    def read(self, ports: Sequence[str] | None = None, *, neighbours: bool = False) -> SwitchState:
        settings, flows = self._read_settings(), self._read_flows()
        picked = pick_ports(self.bridge, self._read_ports(flows), ports)
        if neighbours:
            picked = tuple(read_neighbour(self._commands, port) for port in picked)
        others = sum(not flow.is_ours for flow in flows)
        return SwitchState(
            picked, None, bool(settings["stp_enable"] or settings["rstp_enable"]), _text(settings["fail_mode"]) or "standalone",
            relay_table.count_own(flows), others,
        )  # fmt: skip

    def set_hairpin(self, port: str, *, on: bool, macs: Sequence[str] = ()) -> None:
        """Raises SwitchError if the bridge has flows of others: a change of fail-mode would delete them."""
        if macs and not on:
            raise SwitchError("addresses are bound only to a port that reflects", "omit the addresses")
        number, flows = self._find_number(port), self._read_flows()
        relay = relay_table.read_relay(flows).with_port(number, tuple(sorted(set(macs))) if on else None)
        self._install(port, relay, flows)
        check_hairpin(self.read([port]).ports[0], on=on)

    def set_channel(self, port: str, channel: PortChannel) -> None:
        """Raises as ``set_hairpin``."""
        number, flows = self._find_number(port), self._read_flows()
        self._install(port, relay_table.read_relay(flows).with_channel(number, channel), flows)
        check_channel(self.read([port]).ports[0], channel)

    def remove_channel(self, port: str, vlan: int, snapshot: str) -> None:
        """The table stays if anything else of it is in use, or was before the first change."""
        before = self._parse_before(snapshot)
        flows, numbers = self._read_flows(), self._read_numbers()
        relay = relay_table.read_relay(flows).only(numbers.values())
        left = relay.without_channel(numbers[port], vlan) if port in numbers else relay
        # A restart of ovs-vswitchd loses the flows, but not the fail-mode: nothing would pass.
        is_unused = not (left.ports or left.channels or before.has_table)
        mode_stays = is_unused and _text(self._read_settings()["fail_mode"]) != before.fail_mode
        if relay_table.read_relay(flows) != left or mode_stays:
            self._revert(left, before)
            if relay_table.read_relay(self._read_flows()) != left:
                raise SwitchError(f"port {port}: VLAN {vlan} is still translated", "check that no controller changes the flows")

    def snapshot(self, port: str) -> str:
        number, flows = self._find_number(port), self._read_flows()
        relay, settings = relay_table.read_relay(flows), self._read_settings()
        mode, normal = _text(settings["fail_mode"]), any(one.is_normal for one in flows)
        has_table = relay_table.count_own(flows) > 0
        if (recorded := _read_recorded(settings)) and mode == _SECURE:
            has_table, (mode, normal) = False, recorded
        return json.dumps(asdict(_Before(number in relay.ports, relay.ports.get(number, ()), has_table, mode, normal)))

    def restore(self, port: str, snapshot: str) -> None:
        """The table stays while another port reflects: it may serve another host. Flows of ports that no longer exist do not
        count: their numbers are given to other ports.
        """
        before = self._parse_before(snapshot)
        flows, numbers = self._read_flows(), self._read_numbers()
        if (
            not relay_table.count_own(flows)
            and not before.has_table
            and _text(self._read_settings()["fail_mode"]) == before.fail_mode
        ):
            return
        relay = relay_table.read_relay(flows).only(numbers.values())
        if port in numbers:
            relay = relay.with_port(numbers[port], tuple(before.macs) if before.on else None)
        self._revert(relay, before)

    def close(self) -> None:
        self._commands.close()

    def _install(self, port: str, relay: Relay, flows: tuple[Flow, ...]) -> None:
        if others := [flow for flow in flows if not flow.is_ours and not flow.is_normal]:
            hint = "use a bridge of its own for NoHype hosts, or delete these flows"
            raise SwitchError(f"bridge {self.bridge} has {len(others)} flows that the manager did not create", hint)
        settings = self._read_settings()
        if (mode := _text(settings["fail_mode"])) != _SECURE or not (relay_table.count_own(flows) or _read_recorded(settings)):
            normal = str(any(flow.is_normal for flow in flows)).lower()
            marks = (f"external_ids:{_FAIL_MODE}={mode or _UNSET}", f"external_ids:{_NORMAL}={normal}")
            self._vsctl("set", "bridge", self.bridge, *marks)
            self._vsctl("set-fail-mode", self.bridge, _SECURE)
        if any(flow.is_normal for flow in self._read_flows()):
            self._ofctl("--strict", "del-flows", self.bridge, "table=0,priority=0")
        self._write(relay)
        mode, actual = _text(self._read_settings()["fail_mode"]), relay_table.read_relay(self._read_flows())
        if mode != _SECURE or actual != relay:
            message = f"bridge {self.bridge}: requested fail-mode secure and {relay}, switch has"
            raise SwitchError(f"{message} {mode or 'standalone'} and {actual}", "check that no controller changes it")

    def _revert(self, relay: Relay, before: _Before) -> None:
        if before.has_table or relay.ports or relay.channels:
            self._write(relay)
            return
        self._ofctl("del-flows", self.bridge, f"cookie={relay_table.COOKIE:#x}/-1")
        # Without secure mode ovs-vswitchd adds the default flow itself.
        if before.fail_mode == _SECURE:
            if before.normal:
                self._ofctl("add-flow", self.bridge, "priority=0,actions=NORMAL")
        elif before.fail_mode:
            self._vsctl("set-fail-mode", self.bridge, before.fail_mode)
        else:
            self._vsctl("del-fail-mode", self.bridge)
        self._vsctl("remove", "bridge", self.bridge, "external_ids", _FAIL_MODE, _NORMAL)

    def _write(self, relay: Relay) -> None:
        self._ofctl("--bundle", "add-flows", self.bridge, "-", input=relay_table.build_flows(relay))

    def _parse_before(self, snapshot: str) -> _Before:
        before: _Before = parsed(self._commands, "the undo record of the port", lambda: _Before(**json.loads(snapshot)))
        return before

    def _read_settings(self) -> Mapping[str, Any]:
        rows = self._list("bridge", "name,fail_mode,stp_enable,rstp_enable,external_ids")
        found = next((row for row in rows if row["name"] == self.bridge), None)
        if found is None:
            hint = "list the bridges of the switch with `ovs-vsctl list-br`"
            raise SwitchError(f"there is no bridge {self.bridge} {self._commands.where}", hint)
        return found

    def _list_ports(self) -> tuple[str, ...]:
        return tuple(self._vsctl("list-ifaces", self.bridge).split())

    def _find_number(self, port: str) -> int:
        pick_ports(self.bridge, self._read_ports(()), [port])
        number = self._read_numbers().get(port)
        if number is None:
            raise SwitchError(f"port {port} of bridge {self.bridge} has no OpenFlow number", "check `ovs-vsctl show`")
        return number

    def _read_numbers(self) -> Mapping[str, int]:
        """OpenFlow number of each port that has one: an interface that is missing in the kernel has none."""
        names, rows = self._list_ports(), self._list("interface", "name,ofport")
        return {row["name"]: row["ofport"] for row in rows if row["name"] in names and _is_number(row["ofport"])}

    def _read_flows(self) -> tuple[Flow, ...]:
        text = self._ofctl("--no-names", "dump-flows", self.bridge)
        flows: tuple[Flow, ...] = parsed(self._commands, "the flows", lambda: relay_table.parse_flows(text))
        return flows

    def _read_ports(self, flows: tuple[Flow, ...]) -> tuple[SwitchPort, ...]:
        names = self._list_ports()
        rows = {row["name"]: row for row in self._list("interface", "name,ofport,admin_state,link_state,mtu,statistics")}
        tags = {row["name"]: row["tag"] for row in self._list("port", "name,tag")}

        def build() -> tuple[SwitchPort, ...]:
            return tuple(_build_port(rows[name], tags.get(name), flows) for name in names if name in rows)

        ports: tuple[SwitchPort, ...] = parsed(self._commands, "the ports", build)
        return ports

    def _list(self, table: str, columns: str) -> list[dict[str, Any]]:
        words = ["ovs-vsctl", _TIMEOUT, "--format=json", f"--columns={columns}", "list", table]
        document = read_json(self._commands, words)
        rows: list[dict[str, Any]] = parsed(self._commands, f"the table {table}", lambda: _decode_table(document))
        return rows

    def _vsctl(self, *words: str) -> str:
        return self._commands.run(["ovs-vsctl", _TIMEOUT, *words])

    def _ofctl(self, *words: str, input: str = "") -> str:
        return self._commands.run(["ovs-ofctl", _TIMEOUT, *words], input=input)


def _build_port(row: Mapping[str, Any], tag: object, flows: tuple[Flow, ...]) -> SwitchPort:
    number, counted = row["ofport"], row["statistics"]
    up, carrier = row["admin_state"] == "up", row["link_state"] == "up"
    gaps = (f"vlan: tag {tag} of the port does not apply to flows",) if isinstance(tag, int) else ()
    relay = relay_table.read_relay(flows)
    return SwitchPort(
        name=row["name"],
        up=up,
        carrier=carrier,
        hairpin=number in relay.ports,
        state="forwarding" if up and carrier else "disabled",
        isolated=None,
        mtu=row["mtu"] if isinstance(row["mtu"], int) else None,
        vlans=(PortVlan(tag, pvid=True, untagged=True),) if isinstance(tag, int) else (),
        counters=PortCounters(*(counted.get(name, 0) for name in _COUNTERS)) if counted else None,
        fdb=tuple(FdbEntry(mac, None, static) for port, mac, static in relay_table.read_addresses(flows) if port == number),
        pairs=relay_table.read_pairs(flows, number) if isinstance(number, int) else (),
        neighbour=None,
        gaps=gaps,
        channels=tuple(channel for port, channel in relay.channels if port == number),
    )


def _decode_table(document: Any) -> list[dict[str, Any]]:
    headings = document["headings"]
    return [dict(zip(headings, map(_decode, row), strict=True)) for row in document["data"]]


def _decode(value: Any) -> Any:
    """A value of OVSDB (RFC 7047 5.1): None for an empty set."""
    if isinstance(value, list) and value and value[0] == "set":
        return _decode(value[1][0]) if len(value[1]) == 1 else [_decode(one) for one in value[1]] or None
    if isinstance(value, list) and value and value[0] == "map":
        return dict(value[1])
    return value


def _read_recorded(settings: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Fail-mode and default flow before our table; None if none is recorded."""
    marks = settings["external_ids"] or {}
    mode = marks.get(_FAIL_MODE)
    return ("" if mode == _UNSET else mode, marks.get(_NORMAL) == "true") if mode else None


def _is_number(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
