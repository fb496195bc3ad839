"""The flows of an Open vSwitch bridge that reflects frames at some of its ports: a learning switch with reflective relay. Pure.

The action NORMAL never sends a frame back out of the port it came in on, and neither does ``output`` to that port; only the
port IN_PORT does (ovs-actions(7)). Tables: 0 sources, 10 destination address to port, 15 copies of broadcasts to the VLANs of
guests, 20 output.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

from orchestrator.model.switch import PairCount, PortChannel

COOKIE = 0x4E48
_AGEING = 300  # seconds, as a Linux bridge
_CHANNEL, _BOUND, _STATIC, _LEARNED, _PAIR, _RELAY = 70, 60, 20, 10, 30, 21
"""Priorities by which flows are recognised."""
_TAGGED = 1 << 12  # in NXM_OF_VLAN_TCI: the frame has a tag
_DONE = 0xFFFF  # in reg0: the frame was output
_FORWARD = "resubmit(,15),resubmit(,10),resubmit(,20)"
_MULTICAST = "dl_dst=01:00:00:00:00:00/01:00:00:00:00:00"
_RESERVED = "01:80:c2:00:00:00/ff:ff:ff:ff:ff:f0"  # never forwarded by a bridge (IEEE 802.1Q 8.6.3)
_LEARN = (
    f"learn(cookie={COOKIE:#x},table=10,idle_timeout={_AGEING},priority={_LEARNED},NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],"
    "load:NXM_OF_IN_PORT[]->NXM_NX_REG0[0..15])"
)
_FIELD = re.compile(r"([a-z_0-9]+)=([^,\s]+)")
_PORT = re.compile(r"load:(0x[0-9a-f]+|\d+)->")
_TAG = re.compile(r"mod_vlan_vid:(\d+)")


@dataclass(frozen=True)
class Flow:
    """A flow as `ovs-ofctl dump-flows` prints it."""

    fields: Mapping[str, str]
    actions: str

    def number(self, name: str) -> int:
        return int(self.fields.get(name, "0"), 0)

    @property
    def is_ours(self) -> bool:
        return self.number("cookie") == COOKIE

    @property
    def is_normal(self) -> bool:
        """The flow of a bridge that has no others."""
        return not self.is_ours and self.actions == "NORMAL" and not self.number("priority") and not self.number("table")

    def has(self, table: int, priority: int) -> bool:
        return self.is_ours and (self.number("table"), self.number("priority")) == (table, priority)


@dataclass(frozen=True)
class Relay:
    """The ports (by OpenFlow number) that reflect, each with the addresses that are bound to it; and the translated VLANs."""

    ports: Mapping[int, tuple[str, ...]]
    channels: tuple[tuple[int, PortChannel], ...] = ()  # by port and VLAN

    def with_port(self, port: int, macs: tuple[str, ...] | None) -> Relay:
        """None: the port does not reflect."""
        others = {number: bound for number, bound in self.ports.items() if number != port}
        return Relay(others if macs is None else {**others, port: macs}, self.channels)

    def with_channel(self, port: int, channel: PortChannel) -> Relay:
        found = self.without_channel(port, channel.vlan)
        return Relay(self.ports, tuple(sorted((*found.channels, (port, channel)), key=lambda one: (one[0], one[1].vlan))))

    def without_channel(self, port: int, vlan: int) -> Relay:
        return Relay(self.ports, tuple(one for one in self.channels if (one[0], one[1].vlan) != (port, vlan)))

    def only(self, ports: Collection[int]) -> Relay:
        reflecting = {number: bound for number, bound in self.ports.items() if number in ports}
        return Relay(reflecting, tuple(one for one in self.channels if one[0] in ports))


def parse_flows(text: str) -> tuple[Flow, ...]:
    flows = []
    for line in text.splitlines():
        match, separator, actions = line.partition(" actions=")
        if separator:
            flows.append(Flow(dict(_FIELD.findall(match)), actions.strip()))
    return tuple(flows)


def read_relay(flows: tuple[Flow, ...]) -> Relay:
    bound: dict[int, list[str]] = {flow.number("in_port"): [] for flow in flows if flow.has(20, _RELAY)}
    for flow in flows:
        if flow.has(0, _BOUND) and (macs := bound.get(flow.number("in_port"))) is not None:
            macs.append(flow.fields["dl_src"])
    channels = [_read_channel(flow) for flow in flows if flow.has(0, _CHANNEL)]
    ordered = tuple(sorted(channels, key=lambda one: (one[0], one[1].vlan)))
    return Relay({port: tuple(sorted(macs)) for port, macs in sorted(bound.items())}, ordered)


def _read_channel(flow: Flow) -> tuple[int, PortChannel]:
    tag = _TAG.search(flow.actions)
    return flow.number("in_port"), PortChannel(flow.number("dl_vlan"), flow.fields["dl_src"], int(tag[1]) if tag else 0)


def read_addresses(flows: tuple[Flow, ...]) -> Iterator[tuple[int, str, bool]]:
    """OpenFlow port, address, and whether the address is bound to the port."""
    for flow in flows:
        is_static = flow.has(10, _STATIC)
        if (is_static or flow.has(10, _LEARNED)) and (found := _PORT.search(flow.actions)):
            yield int(found[1], 0), flow.fields["dl_dst"], is_static


def read_pairs(flows: tuple[Flow, ...], port: int) -> tuple[PairCount, ...]:
    """The counters lag about a second behind."""
    return tuple(
        PairCount(flow.fields["dl_src"], flow.fields["dl_dst"], flow.number("n_packets"))
        for flow in flows
        if flow.has(20, _PAIR) and flow.number("in_port") == port
    )


def count_own(flows: tuple[Flow, ...]) -> int:
    """Without learned addresses."""
    return sum(flow.is_ours and not flow.has(10, _LEARNED) for flow in flows)


def build_flows(relay: Relay) -> str:
    """Replaces the flows of this table; for `ovs-ofctl --bundle add-flows`, which makes all changes at the same time."""
    lines = [f"table=0,priority=100,dl_dst={_RESERVED},actions=drop", "table=10,priority=0,actions=drop"]
    lines.append(f"table=0,priority={_LEARNED},actions={_LEARN},{_FORWARD}")
    lines += ["table=20,priority=20,reg0=0,actions=all", "table=20,priority=10,actions=output:NXM_NX_REG0[0..15]"]
    for port, macs in relay.ports.items():
        lines.append(f"table=20,priority={_RELAY},in_port={port},reg0=0,actions=all,in_port")
        # The port may be the one that the frame came in on: OpenFlow drops such an output unless the register IN_PORT is cleared.
        clear = "load:0->NXM_OF_IN_PORT[],output:NXM_NX_REG0[0..15]"
        lines.append(f"table=20,priority=11,in_port={port},actions={clear}")
        for mac in macs:
            lines.append(f"table=0,priority={_BOUND},in_port={port},dl_src={mac},actions={_FORWARD}")
            lines.append(f"table=0,priority=50,dl_src={mac},actions=drop")
            lines.append(f"table=10,priority={_STATIC},dl_dst={mac},actions=load:{port}->NXM_NX_REG0[0..15]")
        for source, target in permutations(macs, 2):
            lines.append(f"table=20,priority={_PAIR},in_port={port},dl_src={source},dl_dst={target},actions=in_port")
    lines += _build_channels(relay.channels)
    return "".join(f"{line}\n" for line in [f"delete cookie={COOKIE:#x}/-1", *(f"add cookie={COOKIE:#x},{one}" for one in lines)])


def _build_channels(channels: tuple[tuple[int, PortChannel], ...]) -> Iterator[str]:
    """A guest's VLAN belongs to one port and one address. Its frames are forwarded as frames of the VLAN that it is translated
    to; a frame to its address, and a copy of each broadcast there, is translated back. Its address is not learned.
    """
    if channels:
        yield f"table=20,priority={_CHANNEL},reg0={_DONE:#x},actions=drop"
    for vlan in sorted({one.vlan for _, one in channels}):
        # Another station could otherwise send into the VLAN of a guest.
        yield f"table=0,priority=64,dl_vlan={vlan},actions=drop"
    members: dict[int, list[tuple[int, PortChannel]]] = {}
    for port, one in channels:
        members.setdefault(one.switch_vlan, []).append((port, one))
        inside = f"mod_vlan_vid:{one.switch_vlan}" if one.switch_vlan else "strip_vlan"
        onward = f"load:{one.vlan}->NXM_NX_REG1[],{_FORWARD}"
        yield f"table=0,priority={_CHANNEL},in_port={port},dl_vlan={one.vlan},dl_src={one.mac},actions={inside},{onward}"
        yield f"table=0,priority=65,in_port={port},dl_vlan={one.vlan},actions=drop"
        match = f"{_match_vlan(one.switch_vlan)},dl_dst={one.mac}"
        yield f"table=10,priority=30,{match},actions={_output(port, one)},load:{_DONE:#x}->NXM_NX_REG0[0..15]"
    for vlan, found in members.items():
        yield f"table=15,priority=10,{_match_vlan(vlan)},{_MULTICAST},actions={_copy(found)}"
        for port, one in found:
            others = [other for other in found if other != (port, one)]
            match = f"reg1={one.vlan},in_port={port},{_MULTICAST}"
            yield f"table=15,priority=20,{match},actions={_copy(others)}"


def _match_vlan(vlan: int) -> str:
    return f"dl_vlan={vlan}" if vlan else "vlan_tci=0"


def _copy(channels: list[tuple[int, PortChannel]]) -> str:
    return ",".join(_output(port, one) for port, one in channels) or "drop"


def _output(port: int, channel: PortChannel) -> str:
    """``clone`` keeps the frame as it is for the actions that follow (ovs-actions(7)). In it, mod_vlan_vid adds a second tag
    (seen with 3.5): the tag is written as a whole.
    """
    return f"clone(load:0->NXM_OF_IN_PORT[],load:{_TAGGED | channel.vlan:#x}->NXM_OF_VLAN_TCI[],output:{port})"
