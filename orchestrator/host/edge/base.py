"""What a module of an edge mode has. Adding a mode is a module and an entry in a list of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.host.root import Chain, HostRoot, Rule
from orchestrator.model.edge import EdgeMode
from orchestrator.model.topology import Interface, Link, PhysicalFunction
from orchestrator.values import MacAddress


class HardwareEdge(Protocol):
    """Sets where a kind of PF switches between its VFs. Errors are HostErrors."""

    def serves(self, pf: PhysicalFunction, /) -> bool: ...

    def may_have_vepa(self, pf: PhysicalFunction, /) -> bool:
        """False if its chip and driver are not known to support VEPA."""

    def read_mode(self, host: HostRoot, pf: PhysicalFunction, /) -> EdgeMode | None:
        """None if neither chip nor driver reports it."""

    def set_mode(self, host: HostRoot, pf: PhysicalFunction, mode: EdgeMode, /) -> None:
        """No-op if the PF has the mode; reads back."""

    def describe(self, host: HostRoot, pf: PhysicalFunction, /) -> str:
        """One line of evidence."""


@dataclass(frozen=True)
class Tap:
    """The host's interface of a guest's NIC."""

    name: str
    mac: MacAddress  # of the guest's NIC
    uplink: str


class SoftwareEdge(Protocol):
    """Makes the host's kernel send every frame of a guest out of the uplink. Errors are HostErrors.

    ``KIND`` is the kernel's kind of its taps. ``PROMISCUOUS``: the uplink must be in promiscuous mode, because the kernel does
    not add the guests' addresses to its filter.
    """

    @property
    def KIND(self) -> str: ...  # noqa: N802

    def check_uplink(self, interface: Interface, /) -> str:
        """The reason why the interface cannot be an uplink of this mode, or empty. Pure."""

    @property
    def PROMISCUOUS(self) -> bool: ...  # noqa: N802

    def find_uplink(self, host: HostRoot, link: Link, /) -> str:
        """The uplink of an existing tap; empty if it has none. Raises HostError if it cannot be read."""

    def create(self, host: HostRoot, tap: Tap, /) -> None:
        """Creates the tap with all its rules, and reads both back. The tap is set up last."""

    def remove(self, host: HostRoot, tap: Tap, /) -> None:
        """Removes the tap and its rules, whatever of them exists. Refuses an interface that is not this tap."""

    def restore(self, host: HostRoot, tap: Tap, /) -> None:
        """Sets the settings and rules of an existing tap again; not its kind, address and uplink."""

    def diff(self, host: HostRoot, tap: Tap, /) -> tuple[str, ...]:
        """One sentence per difference between the kernel and what ``create`` makes."""


NO_UPLINKS = ("macvtap", "macvlan", "ipvlan", "ipvtap", "bridge", "tun")
"""Kinds of interfaces that no software edge can use as an uplink."""


def name_table(tap: str) -> str:
    """The table of nftables, family netdev, with the rules of a tap."""
    return f"nohype-{tap}"


def diff_rules(host: HostRoot, tap: Tap, *wanted: Chain) -> tuple[str, ...]:
    if host.net.read_table(name_table(tap.name)) == wanted:
        return ()
    return (f"{tap.name}: the filter rules in nftables table netdev {name_table(tap.name)} are missing or were changed",)


def find_link(host: HostRoot, name: str) -> Link | None:
    return next((link for link in host.net.read_links() if link.name == name), None)


def match(left: dict[str, Any], right: str | int | dict[str, Any], op: str = "==") -> dict[str, Any]:
    """A statement of a rule."""
    return {"match": {"op": op, "left": left, "right": right}}


def ether(name: str) -> dict[str, Any]:
    """A field of the Ethernet header: saddr, daddr, type."""
    return {"payload": {"protocol": "ether", "field": name}}


def build_sender_rules(mac: MacAddress) -> list[Rule]:
    """A guest sends only from its own address, without VLAN tags, and no control frames of switches.

    These are frames to the addresses that bridges never forward (IEEE 802.1Q table 8-1: STP, LLDP, LACP and the like), frames of
    Cisco's protocols (CDP, VTP, DTP, PVST: DTP asks a port to become a trunk), and MAC control frames to any address (IEEE 802.3
    annex 31A: pause). VLAN tags have also the EtherType that switches used before IEEE 802.1ad.
    """

    def drop_if(left: dict[str, Any], right: str | int, op: str = "==") -> Rule:
        return [match(left, right, op), {"counter": None}, {"drop": None}]

    return [
        drop_if(ether("saddr"), str(mac), "!="),
        drop_if({"&": [ether("daddr"), "ff:ff:ff:ff:ff:f0"]}, "01:80:c2:00:00:00"),
        drop_if({"&": [ether("daddr"), "ff:ff:ff:ff:ff:f0"]}, "01:00:0c:cc:cc:c0"),
        # nft prints EtherTypes that it has no name for as numbers.
        *(drop_if(ether("type"), kind) for kind in ("8021q", "8021ad", 0x9100, 0x8808)),
    ]
