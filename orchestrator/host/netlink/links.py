"""Interfaces: what there are, whether they are up, how a NIC switches between its VFs, and word of their changes."""

from __future__ import annotations

from collections.abc import Iterator
from errno import ENOBUFS, EOPNOTSUPP

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
    """All interfaces, in our network namespace or in the named one.

    Raises:
        HostError: no such network namespace (ENOENT), or the kernel refused.
    """
    with opened("read the network interfaces", netns) as ipr:
        return read_all(ipr)


def read_addressed() -> frozenset[str]:
    """The names of the interfaces that have an IP address.

    Raises:
        HostError: the kernel refused.
    """
    with opened("read the IP addresses") as ipr:
        used = {message["index"] for message in ipr.get_addr()}
        return frozenset(link.name for link in read_all(ipr) if link.index in used)


def watch_links() -> Iterator[str]:
    """Yields the name of an interface each time that something about it changed, for ever. Blocks.

    When the kernel had to drop notices (ENOBUFS), every interface may have changed, and each is named once.

    Raises:
        HostError: the kernel refused.
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
    """Sets an interface administratively up or down, and reads back. Its carrier may follow seconds later.

    Raises:
        HostError: no such interface (ENODEV), or its driver refused.
    """
    what = f"set {interface} {'up' if up else 'down'}"
    with opened(what, netns) as ipr:
        ipr.link("set", index=find_index(ipr, interface, what), state="up" if up else "down")
    if find_link(read_links(netns=netns), interface, what).up != up:
        raise HostError(f"{interface} was to be {'up' if up else 'down'}, but is not", "something else sets it: NetworkManager?")


def read_hwmode(interface: str) -> str | None:
    """How the NIC switches between its VFs: "veb" (inside), "vepa" (all goes out); None where the driver does not tell (igb).

    Raises:
        HostError: no such interface (ENODEV).
    """
    what = f"read the switching mode of {interface}"
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
    """Sets how the NIC switches between its VFs, as `bridge link set dev X hwmode vepa` does, and reads back.

    Args:
        mode: "veb" or "vepa".

    Raises:
        HostError: the driver cannot (EOPNOTSUPP), or the mode reads back differently, with both.
    """
    what = f"set {interface} to hwmode {mode}"
    hints = {EOPNOTSUPP: "its driver has no hwmode (ixgbe, i40e, ice, mlx5, bnxt, nfp and be2net have)"}
    with opened(what, None, hints) as ipr:
        # RTM_SETLINK, AF_BRIDGE, IFLA_AF_SPEC {IFLA_BRIDGE_FLAGS self, IFLA_BRIDGE_MODE}: the driver's ndo_bridge_setlink.
        ipr.vlan_filter("add", index=find_index(ipr, interface, what), vlan_flags="self", mode=_HWMODES[mode])
    actual = read_hwmode(interface)
    if actual != mode:
        raise HostError(f"{interface} was to have hwmode {mode}, but has {actual or 'none'}")
