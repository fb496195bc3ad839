"""Network interfaces: reading, link state, edge mode of a NIC, and notifications of changes."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EADDRINUSE, ENOBUFS, EOPNOTSUPP

from orchestrator.errors import HostError
from orchestrator.host.netlink.sockets import (
    HINTS,
    RTMGRP_LINK,
    IPRoute,
    NetlinkError,
    errno_of,
    find_index,
    find_link,
    opened,
    read_all,
)
from orchestrator.model.topology import Link

AF_BRIDGE = 7  # include/linux/socket.h
# include/uapi/linux/if_bridge.h, BRIDGE_MODE_VEB and _VEPA; 0xffff is BRIDGE_MODE_UNDEF
_HWMODES = {"veb": 0, "vepa": 1}


def read_links(*, netns: str | None = None) -> tuple[Link, ...]:
    with opened("read the network interfaces", netns) as ipr:
        return read_all(ipr)


def read_addressed() -> frozenset[str]:
    """Names of interfaces with an IP address."""
    with opened("read the IP addresses") as ipr:
        used = {message["index"] for message in ipr.get_addr()}
        return frozenset(link.name for link in read_all(ipr) if link.index in used)


def watch_links() -> Iterator[str]:
    """Yields the name of each interface that changes, indefinitely; blocks. After lost notifications (ENOBUFS) it yields all
    interfaces.
    """
    while True:
        try:
            with IPRoute() as ipr:
                ipr.bind(groups=RTMGRP_LINK)
                while True:
                    for message in ipr.get():
                        yield str(message.get_attr("IFLA_IFNAME"))
        except (NetlinkError, OSError) as error:
            number = errno_of(error)
            if number != ENOBUFS:
                raise HostError("cannot watch the network interfaces", HINTS.get(number, ""), number) from None
        yield from [link.name for link in read_links()]


def set_link_up(interface: str, *, up: bool, netns: str | None = None) -> None:
    """Administratively; the carrier can follow seconds later."""
    what = f"set {interface} {'up' if up else 'down'}"
    with opened(what, netns, {EADDRINUSE: "remove the macvlan or macvtap that has its address: ip -d link show"}) as ipr:
        ipr.link("set", index=find_index(ipr, interface, what), state="up" if up else "down")
    if find_link(read_links(netns=netns), interface, what).up != up:
        what = f"{interface} is {'down' if up else 'up'}, expected {'up' if up else 'down'}"
        raise HostError(what, "check whether NetworkManager manages the interface")


def read_hwmode(interface: str) -> str | None:
    """The mode "veb" or "vepa"; None if the driver does not report it (igb)."""
    what = f"read the edge mode of {interface}"
    with opened(what) as ipr:
        index = find_index(ipr, interface, what)
        for message in ipr.link("dump", family=AF_BRIDGE):
            if message["index"] == index and (spec := message.get_attr("IFLA_AF_SPEC")) is not None:
                mode = spec.get_attr("IFLA_BRIDGE_MODE")
                for name, number in _HWMODES.items():
                    if mode == number:
                        return name
    return None


def set_hwmode(interface: str, mode: str) -> None:
    """As `bridge link set dev X hwmode vepa` does. Raises HostError (EOPNOTSUPP) if the driver does not support it."""
    what = f"set hwmode {mode} on {interface}"
    hints = {EOPNOTSUPP: "use a NIC whose driver supports hwmode: ixgbe, i40e, ice, mlx5, bnxt, nfp or be2net"}
    with opened(what, None, hints) as ipr:
        # RTM_SETLINK, AF_BRIDGE, IFLA_AF_SPEC {IFLA_BRIDGE_FLAGS self, IFLA_BRIDGE_MODE}: the driver's ndo_bridge_setlink
        ipr.vlan_filter("add", index=find_index(ipr, interface, what), vlan_flags="self", mode=_HWMODES[mode])
    actual = read_hwmode(interface)
    if actual != mode:
        raise HostError(f"{interface}: requested hwmode {mode}, kernel set {actual or 'none'}")
