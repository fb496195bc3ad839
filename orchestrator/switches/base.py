"""What a driver of an external switch offers."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from orchestrator.errors import SwitchError
from orchestrator.model.switch import PortChannel, SwitchPort, SwitchState


class Capability(StrEnum):
    """What a driver can do beyond reading a port. The values are part of the API."""

    HAIRPIN = "set hairpin"
    CHANNELS = "translate VLANs of guests"
    BINDING = "bind addresses to a port"
    PAIR_COUNTERS = "count frames per address pair"
    NOTICES = "report changes"
    """Changes are announced by the kernel; other drivers are polled."""
    FRAME_COUNTERS = "count echo frames"


class Driver(Protocol):
    """An opened switch. Methods raise SwitchError; ``close`` does not."""

    @property
    def can(self) -> frozenset[Capability]: ...

    def read(self, ports: Sequence[str] | None = None, *, neighbours: bool = False) -> SwitchState:
        """The bridge with these ports in this order; None for all ports. A port that does not exist is an error.

        ``neighbours``: also asks the LLDP daemon, a program per port.
        """

    def set_hairpin(self, port: str, *, on: bool, macs: Sequence[str] = ()) -> None:
        """Reads back what it set. ``macs``: with `Capability.BINDING`, the addresses behind the port."""

    def set_channel(self, port: str, channel: PortChannel) -> None:
        """Translates a VLAN of the port, both ways, and reads that back. Replaces an earlier translation of the VLAN."""

    def remove_channel(self, port: str, vlan: int, snapshot: str) -> None:
        """No-op without such a translation or port. ``snapshot``: of the port before the first one."""

    def snapshot(self, port: str) -> str:
        """What ``restore`` needs to revert a later ``set_hairpin``."""

    def restore(self, port: str, snapshot: str) -> None:
        """No-op if the port no longer exists, and harmless if nothing was changed."""

    def close(self) -> None: ...


def pick_ports(bridge: str, found: Sequence[SwitchPort], wanted: Sequence[str] | None) -> tuple[SwitchPort, ...]:
    """Raises SwitchError if a port does not exist."""
    if wanted is None:
        return tuple(found)
    by_name = {port.name: port for port in found}
    if missing := [name for name in wanted if name not in by_name]:
        names = ", ".join(by_name) or "none"
        raise SwitchError(f"bridge {bridge} has no port {missing[0]}; its ports: {names}", "check the name of the port")
    return tuple(by_name[name] for name in wanted)


def refuse_addresses(macs: Sequence[str]) -> None:
    """For a driver without `Capability.BINDING`."""
    if macs:
        raise SwitchError("a Linux bridge learns addresses and takes no list of them", "omit the addresses")


def format_hairpin(port: SwitchPort) -> str:
    return "on" if port.hairpin else "off"


def check_hairpin(port: SwitchPort, *, on: bool) -> None:
    """After a change: raises SwitchError if the switch reports another value."""
    if port.hairpin != on:
        wanted, actual = ("on", "off") if on else ("off", "on")
        raise SwitchError(f"port {port.name}: requested hairpin {wanted}, switch reports {actual}", "check the switch's log")


def check_channel(port: SwitchPort, channel: PortChannel) -> None:
    """After a change: raises SwitchError if the switch reports another translation. Not every driver reports addresses."""
    found = next((one for one in port.channels if one.vlan == channel.vlan), None)
    if found is None or (found.switch_vlan, found.mac or channel.mac) != (channel.switch_vlan, channel.mac):
        actual = describe_channel(found) if found else "none"
        message = f"port {port.name}: requested the translation {describe_channel(channel)}, switch reports {actual}"
        raise SwitchError(message, "check the switch's log")


def describe_channel(channel: PortChannel) -> str:
    to = f"VLAN {channel.switch_vlan}" if channel.switch_vlan else "untagged frames"
    return f"VLAN {channel.vlan} to {to}" + (f" for {channel.mac}" if channel.mac else "")
