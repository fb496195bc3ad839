"""The ports of a Linux bridge as external switch: flags, VLANs, forwarding database and counters."""

from __future__ import annotations

from dataclasses import dataclass
from errno import ENODEV
from typing import Any

from orchestrator.errors import HostError
from orchestrator.host.netlink.links import AF_BRIDGE
from orchestrator.host.netlink.sockets import IFF_UP, opened
from orchestrator.model.switch import FdbEntry, PortCounters, PortVlan, SwitchPort

# include/uapi/linux/rtnetlink.h: adds the VLANs of a port to a dump of the family AF_BRIDGE.
_RTEXT_FILTER_BRVLAN = 2
# include/uapi/linux/if_bridge.h
_STATES = ("disabled", "listening", "learning", "forwarding", "blocking")
_VLAN_PVID, _VLAN_UNTAGGED = 1 << 1, 1 << 2
# include/uapi/linux/neighbour.h
_NUD_NOARP, _NUD_PERMANENT = 0x40, 0x80
_COUNTERS = ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes", "rx_dropped", "tx_dropped")


@dataclass(frozen=True)
class BridgeState:
    vlan_filtering: bool
    stp: bool
    ports: tuple[SwitchPort, ...]


def read_bridge(bridge: str, netns: str | None = None) -> BridgeState:
    """The bridge with all its ports. Raises HostError if the interface does not exist or is not a bridge (ENODEV)."""
    what = f"read bridge {bridge}"
    with opened(what, netns) as ipr:
        links = {message["index"]: message for message in ipr.link("dump")}
        data = _find_settings(links, bridge, what)
        index = next(number for number, message in links.items() if message.get_attr("IFLA_IFNAME") == bridge)
        fdb = _group_fdb(ipr)
        ports = [
            _parse_port(message, links[message["index"]], fdb.get(message["index"], ()))
            for message in ipr.link("dump", family=AF_BRIDGE, ext_mask=_RTEXT_FILTER_BRVLAN)
            if message.get_attr("IFLA_MASTER") == index and message.get_attr("IFLA_PROTINFO") and message["index"] in links
        ]
    filtering, stp = bool(data.get_attr("IFLA_BR_VLAN_FILTERING")), bool(data.get_attr("IFLA_BR_STP_STATE"))
    return BridgeState(filtering, stp, tuple(ports))


def _find_settings(links: dict[int, Any], bridge: str, what: str) -> Any:
    for message in links.values():
        if message.get_attr("IFLA_IFNAME") == bridge:
            if message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") != "bridge":
                break
            return message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    hint = "list the bridges with `ip link show type bridge`"
    raise HostError(f"cannot {what}: there is no bridge of this name", hint, ENODEV)


def _group_fdb(ipr: Any) -> dict[int, tuple[FdbEntry, ...]]:
    """Learned and static addresses of other stations by port. An address of the bridge's own interfaces is permanent."""
    found: dict[int, tuple[FdbEntry, ...]] = {}
    for message in ipr.fdb("dump"):
        if message.get_attr("NDA_MASTER") and not message["state"] & _NUD_PERMANENT:
            is_static = bool(message["state"] & _NUD_NOARP)
            entry = FdbEntry(message.get_attr("NDA_LLADDR"), message.get_attr("NDA_VLAN"), is_static)
            found[message["ifindex"]] = (*found.get(message["ifindex"], ()), entry)
    return found


def _parse_port(message: Any, link: Any, fdb: tuple[FdbEntry, ...]) -> SwitchPort:
    port, statistics = message.get_attr("IFLA_PROTINFO"), link.get_attr("IFLA_STATS64")
    isolated = port.get_attr("IFLA_BRPORT_ISOLATED")
    return SwitchPort(
        name=message.get_attr("IFLA_IFNAME"),
        up=bool(link["flags"] & IFF_UP),
        carrier=bool(link.get_attr("IFLA_CARRIER")),
        # IFLA_BRPORT_MODE is the hairpin flag (net/bridge/br_netlink.c).
        hairpin=bool(port.get_attr("IFLA_BRPORT_MODE")),
        state=_STATES[port.get_attr("IFLA_BRPORT_STATE")],
        isolated=None if isolated is None else bool(isolated),
        mtu=link.get_attr("IFLA_MTU"),
        vlans=_parse_vlans(message.get_attr("IFLA_AF_SPEC")),
        counters=PortCounters(*(statistics[name] for name in _COUNTERS)) if statistics else None,
        fdb=fdb,
        pairs=(),
        neighbour=None,
    )


def _parse_vlans(spec: Any) -> tuple[PortVlan, ...]:
    """Empty without VLAN filtering."""
    vlans = spec.get_attrs("IFLA_BRIDGE_VLAN_INFO") if spec is not None else ()
    return tuple(PortVlan(vlan["vid"], bool(vlan["flags"] & _VLAN_PVID), bool(vlan["flags"] & _VLAN_UNTAGGED)) for vlan in vlans)
