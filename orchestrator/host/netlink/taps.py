"""macvtap and tap devices: the host's end of a NIC of a software edge."""

from __future__ import annotations

import fcntl
import os
import struct
from errno import EACCES, EAFNOSUPPORT, EBUSY, EEXIST, EINVAL, ENODEV, ENOENT, EOPNOTSUPP, EPERM
from typing import Any

from orchestrator.errors import HostError
from orchestrator.host.netlink.links import read_links
from orchestrator.host.netlink.sockets import (
    IFF_ALLMULTI,
    IFF_PROMISC,
    NetlinkError,
    errno_of,
    find_index,
    find_link,
    opened,
    read_all,
)
from orchestrator.values import MacAddress

_IN6_ADDR_GEN_MODE_NONE = 1  # include/uapi/linux/if_link.h
_TUN = "/dev/net/tun"
# include/uapi/linux/if_tun.h
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x4004_54CA, 0x4004_54CB, 0x4004_54CC
_TUN_HINTS = {
    ENOENT: "load the module tun: modprobe tun",
    ENODEV: "load the module tun: modprobe tun",
    EPERM: "permit the device in the unit of nohyped: DeviceAllow=/dev/net/tun rw",
    EACCES: "run as root",
    EBUSY: "a program uses the interface of this name: ip -d link show",
}
_DRAIN_HINTS = {
    EEXIST: "remove the interface of this name, if no program uses it: ip link delete",
    EOPNOTSUPP: "load the module bridge: modprobe bridge",
}
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


def create_tap(name: str, uplink: str, mac: MacAddress, drain: str) -> None:
    """Persistent, down, with the MTU of the uplink; ``mac`` is the host's end. Only root can attach to it.

    It is the only port of the bridge ``drain``, which stays down: a frame that no rule of nftables takes is dropped there, and
    does not enter the host's network stack.
    """
    what = f"create tap {name}"
    with opened(what, None, _DRAIN_HINTS) as ipr:
        mtu = find_link(read_all(ipr), uplink, what).mtu
        ipr.link("add", ifname=drain, kind="bridge", address=str(mac), br_mcast_snooping=0)
        descriptor = _open_tap(name, what)
        try:
            _set_tap(ipr, name, mac, mtu, drain)
            # Last: if this process is killed before, the kernel removes the tap.
            fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
        finally:
            os.close(descriptor)


def restore_tap(name: str, uplink: str, mac: MacAddress, drain: str) -> None:
    """Sets address, bridge and MTU of a tap again, and the bridge down; not its state."""
    what = f"restore tap {name}"
    with opened(what, None, _DRAIN_HINTS) as ipr:
        links = read_all(ipr)
        if not any(link.name == drain for link in links):
            ipr.link("add", ifname=drain, kind="bridge", address=str(mac), br_mcast_snooping=0)
        _set_tap(ipr, name, mac, find_link(links, uplink, what).mtu, drain)


def _open_tap(name: str, what: str) -> int:
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot {what} ({_TUN})", _TUN_HINTS.get(error.errno or 0, ""), error.errno or 0) from None
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        # Without an owner every user of the host may attach to it.
        fcntl.ioctl(descriptor, _TUNSETOWNER, 0)
    except OSError as error:
        os.close(descriptor)
        raise HostError(f"cannot {what} ({_TUN})", _TUN_HINTS.get(error.errno or 0, ""), error.errno or 0) from None
    return descriptor


def _set_tap(ipr: Any, name: str, mac: MacAddress, mtu: int, drain: str) -> None:
    links, what = read_all(ipr), f"set up tap {name}"
    tap, bridge = find_link(links, name, what), find_link(links, drain, what)
    ipr.link("set", index=bridge.index, state="down")
    if (tap.mac, tap.mtu) != (mac, mtu):
        ipr.link("set", index=tap.index, address=str(mac), mtu=mtu)
    if tap.master != drain:
        ipr.link("set", index=tap.index, master=bridge.index)
    for index in (tap.index, bridge.index):
        _disable_ipv6_address(ipr, index)


def set_promiscuous(interface: str, *, on: bool) -> None:
    """As `ip link set X promisc on` does: independent of what packet sockets and bridges request."""
    what = f"set promiscuous mode of {interface} {'on' if on else 'off'}"
    with opened(what) as ipr:
        ipr.link("set", index=find_index(ipr, interface, what), flags=IFF_PROMISC if on else 0, change=IFF_PROMISC)
        if find_link(read_all(ipr), interface, what).promiscuous != on:
            raise HostError(f"cannot {what}: the kernel keeps the old state", "check which program manages the interface")


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
