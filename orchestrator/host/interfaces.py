"""Ethernet interfaces of the host that could be the uplink of a software edge."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.host.root import HostRoot
from orchestrator.model.topology import Interface, Link

_GUESTS_KINDS = ("macvtap", "ipvtap", "tun")
"""Interfaces of virtual machines: they come and go, and cannot be uplinks."""


def read_interfaces(host: HostRoot) -> tuple[Interface, ...]:
    found = [
        Interface(link.name, link.up and link.carrier, link.mac, link.master, link.kind, _read_node(host, link.name))
        for link in host.net.read_links()
        if link.ethernet and link.mac and link.kind not in _GUESTS_KINDS
    ]
    return tuple(sorted(found, key=lambda interface: interface.name))


def find_lower(links: Iterable[Link], uplink: str) -> frozenset[str]:
    """The interfaces through which the frames of a stacked uplink pass: members of a bond, team or bridge, the parent of a VLAN
    or macvlan, and theirs. The uplink itself is not among them.
    """
    known = tuple(links)
    found: set[str] = set()
    todo = [uplink]
    while todo:
        upper = todo.pop()
        below = {link.name for link in known if link.master == upper}
        below |= {link.parent for link in known if link.name == upper and link.parent}
        todo += below - found
        found |= below
    return frozenset(found - {uplink})


def _read_node(host: HostRoot, name: str) -> int | None:
    text = host.find(f"sys/class/net/{name}/device/numa_node") or "-1"
    return int(text) if text.isdecimal() else None


def read_index(host: HostRoot, name: str) -> int | None:
    """The kernel's number of an interface; None if it does not exist."""
    text = host.find(f"sys/class/net/{name}/ifindex")
    return int(text) if text and text.isdecimal() else None
