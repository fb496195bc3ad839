"""Ethernet interfaces of the host that could be the uplink of a software edge."""

from __future__ import annotations

from orchestrator.host.root import HostRoot
from orchestrator.model.topology import Interface

_GUESTS_KINDS = ("macvtap", "ipvtap", "tun")
"""Interfaces of virtual machines: they come and go, and cannot be uplinks."""


def read_interfaces(host: HostRoot) -> tuple[Interface, ...]:
    found = [
        Interface(link.name, link.up and link.carrier, link.mac, link.master, link.kind, _read_node(host, link.name))
        for link in host.net.read_links()
        if link.ethernet and link.mac and link.kind not in _GUESTS_KINDS
    ]
    return tuple(sorted(found, key=lambda interface: interface.name))


def _read_node(host: HostRoot, name: str) -> int | None:
    text = host.find(f"sys/class/net/{name}/device/numa_node") or "-1"
    return int(text) if text.isdecimal() else None
