"""macvtap devices: the host's end of a NIC of a software edge."""

from __future__ import annotations

from errno import EAFNOSUPPORT, EBUSY, EEXIST, EINVAL, EOPNOTSUPP
from typing import Any

from orchestrator.errors import HostError
from orchestrator.host.netlink.links import read_links
from orchestrator.host.netlink.sockets import IFF_ALLMULTI, NetlinkError, errno_of, find_index, find_link, opened, read_all
from orchestrator.values import MacAddress

_IN6_ADDR_GEN_MODE_NONE = 1  # include/uapi/linux/if_link.h
_HINTS = {
    EBUSY: "use an uplink that is not a port of a bridge, bond or team, and has no macvtap in passthru mode",
    EEXIST: "remove the interface of this name, if no program uses it: ip link delete",
    EOPNOTSUPP: "load the module macvtap: modprobe macvtap",
    EINVAL: "check the uplink: ip -d link show",
}


def create_macvtap(name: str, uplink: str, mac: MacAddress) -> None:
    """In VEPA mode, and down. It receives all multicast: its own filter knows only the groups that the host has joined.

    The host itself sends nothing from it: it makes no IPv6 address when the device is set up.
    """
    what = f"create macvtap {name} on {uplink}"
    with opened(what, None, _HINTS) as ipr:
        parent = find_index(ipr, uplink, what)
        ipr.link("add", ifname=name, kind="macvtap", macvtap_mode="vepa", link=parent, address=str(mac))
        index = find_index(ipr, name, what)
        ipr.link("set", index=index, flags=IFF_ALLMULTI, change=IFF_ALLMULTI)
        _disable_ipv6_address(ipr, index)


def restore_macvtap(name: str) -> None:
    """Sets VEPA mode, all multicast and the MTU of its uplink again on an existing macvtap."""
    what = f"set VEPA mode on macvtap {name}"
    with opened(what, None, _HINTS) as ipr:
        links = read_all(ipr)
        link = find_link(links, name, what)
        ipr.link("set", index=link.index, kind="macvtap", macvtap_mode="vepa")
        ipr.link("set", index=link.index, flags=IFF_ALLMULTI, change=IFF_ALLMULTI)
        for uplink in links:
            if uplink.name == link.parent and uplink.mtu != link.mtu:
                ipr.link("set", index=link.index, mtu=uplink.mtu)


def _disable_ipv6_address(ipr: Any, index: int) -> None:
    """As `ip link set X addrgenmode none` does. By netlink: the manager's /proc/sys is read-only."""
    inet6 = {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", _IN6_ADDR_GEN_MODE_NONE]]}
    try:
        ipr.link("set", index=index, IFLA_AF_SPEC={"attrs": [["AF_INET6", inet6]]})
    except NetlinkError as error:
        if errno_of(error) != EAFNOSUPPORT:  # a kernel without IPv6
            raise


def delete_link(name: str) -> None:
    """Raises HostError (ENODEV) if there is none."""
    what = f"delete interface {name}"
    with opened(what) as ipr:
        link = find_link(read_all(ipr), name, what)
        ipr.link("del", index=link.index)
    if any(now.index == link.index and now.name == name for now in read_links()):
        raise HostError(f"interface {name} still exists after it was deleted", "check which program creates it again")
