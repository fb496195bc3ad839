"""A Linux bridge on this host, through netlink."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from orchestrator.errors import HostError, SwitchError
from orchestrator.host import netlink
from orchestrator.host.frames import EchoFilter, FrameCounter
from orchestrator.model.switch import PortChannel, SwitchPort, SwitchState
from orchestrator.switches import bridge_channels
from orchestrator.switches.base import Capability, check_channel, check_hairpin, format_hairpin, pick_ports, refuse_addresses
from orchestrator.switches.commands import LocalCommands
from orchestrator.switches.lldp import read_neighbour

_OTHER_LLDP = "neighbour: not measured, because the LLDP daemon of a network namespace has no known socket"


class LinuxBridge:
    """``netns``: the named network namespace with the bridge, None for that of this process."""

    can = frozenset({Capability.HAIRPIN, Capability.CHANNELS, Capability.NOTICES, Capability.FRAME_COUNTERS})

    def __init__(self, bridge: str, netns: str | None = None) -> None:
        self.bridge, self.netns = bridge, netns

    def read(self, ports: Sequence[str] | None = None, *, neighbours: bool = False) -> SwitchState:
        with _as_switch_error():
            found = netlink.read_bridge(self.bridge, self.netns)
        channels = {}
        if any(bridge_channels.is_channel(port.name) for port in found.ports):
            channels = bridge_channels.read_channels(self._commands, self.bridge)
        picked = pick_ports(self.bridge, bridge_channels.merge_ports(found.ports, channels), ports)
        if neighbours:
            picked = tuple(map(self._add_neighbour, picked))
        return SwitchState(picked, found.vlan_filtering, found.stp, None, None, None)

    def set_hairpin(self, port: str, *, on: bool, macs: Sequence[str] = ()) -> None:
        refuse_addresses(macs)
        self._check_port(port)
        with _as_switch_error():
            netlink.set_hairpin(port, self.netns, on=on)
        check_hairpin(self._check_port(port), on=on)

    def set_channel(self, port: str, channel: PortChannel) -> None:
        """With the programs of iproute2."""
        self._check_port(port)
        bridge_channels.set_channel(self._commands, self.bridge, port, channel)
        check_channel(self.read([port]).ports[0], channel)

    def remove_channel(self, port: str, vlan: int, snapshot: str) -> None:
        bridge_channels.remove_channel(self._commands, port, vlan)

    def snapshot(self, port: str) -> str:
        return format_hairpin(self._check_port(port))

    def restore(self, port: str, snapshot: str) -> None:
        with _as_switch_error():
            names = [found.name for found in netlink.read_bridge(self.bridge, self.netns).ports]
        if port in names:
            self.set_hairpin(port, on=snapshot == "on")

    def count_frames(self, port: str, wanted: EchoFilter) -> FrameCounter:
        """Counts frames at the port, from the host into the switch as incoming; use it in a ``with``."""
        return FrameCounter(wanted, port, self.netns, promiscuous=True)

    def close(self) -> None:
        pass

    @property
    def _commands(self) -> LocalCommands:
        return LocalCommands(("ip", "netns", "exec", self.netns) if self.netns else ())

    def _check_port(self, port: str) -> SwitchPort:
        """An interface of the same name outside the bridge must not be changed."""
        with _as_switch_error():
            return pick_ports(self.bridge, netlink.read_bridge(self.bridge, self.netns).ports, [port])[0]

    def _add_neighbour(self, port: SwitchPort) -> SwitchPort:
        if self.netns:
            return replace(port, gaps=(*port.gaps, _OTHER_LLDP))
        return read_neighbour(LocalCommands(), port)


@contextmanager
def _as_switch_error() -> Iterator[None]:
    try:
        yield
    except HostError as error:
        raise SwitchError(error.message, error.hint) from None
