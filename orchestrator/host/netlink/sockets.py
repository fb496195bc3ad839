"""A netlink socket for one operation, and look-up of interfaces. The only importer of pyroute2."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EEXIST, EMSGSIZE, ENODEV, ENOENT, EPERM
from types import ModuleType, SimpleNamespace
from typing import Any

from orchestrator.errors import HostError, RequestError
from orchestrator.model.topology import Link
from orchestrator.partial_import import parts_only
from orchestrator.values import MacAddress


class _Ignoring:
    """Takes any call and does nothing."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_words, **_named: None


@contextmanager
def _without_mock() -> Iterator[None]:
    """Imports `unittest.mock` as something smaller: pyroute2 uses it only for an object that takes calls and ignores them."""
    if "unittest" in sys.modules:
        yield
        return
    stand_in: Any = ModuleType("unittest")
    stand_in.mock = SimpleNamespace(Mock=_Ignoring)
    sys.modules["unittest"] = stand_in
    try:
        yield
    finally:
        del sys.modules["unittest"]


# pyroute2's `__init__` imports 64 modules that are not needed here and cost 4 MB (pyroute2 0.9.7), unittest 1 MB.
with parts_only("pyroute2"), _without_mock():
    from pyroute2 import netns as namespaces
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkError
    from pyroute2.netlink.rtnl import RTMGRP_LINK

__all__ = ["RTMGRP_LINK", "IPRoute", "NetlinkError", "namespaces"]

IFF_UP, IFF_PROMISC, IFF_ALLMULTI = 1, 0x100, 0x200  # include/uapi/linux/if.h
_ARPHRD_ETHER = 1  # include/uapi/linux/if_arp.h
# include/uapi/linux/rtnetlink.h. The first requests VFs, the second omits their counters (newer kernels). A VF is 296 bytes with
# counters and 196 without. All VFs are one attribute with a 16-bit length: 221 or 334 VFs (net/core/rtnetlink.c,
# rtnl_fill_vfinfo()).
RTEXT_FILTER_VF, RTEXT_FILTER_SKIP_STATS = 1, 8
NO_MAC = "00:00:00:00:00:00"
HINTS = {
    EPERM: "run as root",
    EEXIST: "use another name; `ip link show` and `ip netns list` show used names",
    EMSGSIZE: "set vfs_per_uplink: the kernel cannot report more than about 330 VFs in one message",
}


@contextmanager
def opened(what: str, netns: str | None = None, hints: dict[int, str] | None = None) -> Iterator[Any]:
    """Errors inside become one HostError that starts with "cannot <what>"."""
    check_netns(what, netns)
    try:
        # flags=0: otherwise pyroute2 creates a missing namespace.
        with IPRoute(netns=netns, flags=0) as ipr:
            yield ipr
    except (NetlinkError, OSError) as error:
        number = errno_of(error)
        where = f" in the network namespace {netns}" if netns else ""
        raise HostError(f"cannot {what}{where}", {**HINTS, **(hints or {})}.get(number, ""), number) from None
    except (NetlinkDecodeError, struct.error, LookupError, TypeError) as error:
        # Older kernels let the length of an attribute overflow, newer ones return EMSGSIZE. pyroute2's parser raises any error.
        raise HostError(f"cannot {what}: cannot parse the kernel's reply ({type(error).__name__})", HINTS[EMSGSIZE]) from None


def netns_exists(name: str) -> bool:
    return name in namespaces.listnetns()


def check_netns(what: str, netns: str | None) -> None:
    if netns is not None and not netns_exists(netns):
        hint = "check the name with `ip netns list`"
        raise HostError(f"cannot {what}: network namespace {netns} does not exist", hint, ENOENT)


def errno_of(error: Exception) -> int:
    return int(error.code if isinstance(error, NetlinkError) else getattr(error, "errno", 0) or 0)


def read_all(ipr: Any) -> tuple[Link, ...]:
    messages = list(ipr.link("dump", ext_mask=RTEXT_FILTER_SKIP_STATS))
    names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in messages}
    return tuple(_parse_link(message, names) for message in messages)


def find_link(links: tuple[Link, ...], interface: str, what: str) -> Link:
    for link in links:
        if link.name == interface:
            return link
    raise HostError(f"cannot {what}: interface {interface} does not exist", "check the name with `ip link show`", ENODEV)


def find_index(ipr: Any, interface: str, what: str) -> int:
    return find_link(read_all(ipr), interface, what).index


def _parse_link(message: Any, names: dict[int, str]) -> Link:
    return Link(
        name=message.get_attr("IFLA_IFNAME"),
        index=message["index"],
        mac=parse_mac(message.get_attr("IFLA_ADDRESS")),
        up=bool(message["flags"] & IFF_UP),
        carrier=bool(message.get_attr("IFLA_CARRIER")),
        master=names.get(message.get_attr("IFLA_MASTER")),
        kind=message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND"),
        # With IFLA_LINK_NETNSID the index belongs to another network namespace.
        parent=names.get(message.get_attr("IFLA_LINK")) if message.get_attr("IFLA_LINK_NETNSID") is None else None,
        mode=_parse_mode(message),
        mtu=int(message.get_attr("IFLA_MTU") or 0),
        all_multicast=bool(message["flags"] & IFF_ALLMULTI),
        promiscuous=bool(message["flags"] & IFF_PROMISC),
        ethernet=message["ifi_type"] == _ARPHRD_ETHER,
    )


def _parse_mode(message: Any) -> str:
    for attribute in ("IFLA_MACVTAP_MODE", "IFLA_MACVLAN_MODE"):
        if mode := message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", attribute):
            return str(mode)
    return ""


def parse_mac(text: str | None) -> MacAddress | None:
    """None if it is not a unicast Ethernet address: all zeros, a tunnel's IP address, InfiniBand's 20 bytes."""
    try:
        return MacAddress.parse(text or NO_MAC)
    except RequestError:
        return None
