"""Network interfaces, VFs as their PF sees them, bridges and network namespaces. The only user of pyroute2.

Each function opens a socket of its own and closes it: a long-lived one leaks an acknowledgement for every `get` (pyroute2 0.9.7).
For the same reason interfaces are looked up by a dump. pyroute2 runs an event loop inside, so an asyncio program must call
these functions in a thread. Sources: rtnetlink(7), include/uapi/linux/if_link.h, ip-link(8), bridge(8).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EBUSY, EEXIST, EINVAL, ENOBUFS, ENODEV, ENOENT, EOPNOTSUPP, EPERM
from typing import Any

from orchestrator.errors import HostError, RequestError
from orchestrator.topology import Link, VfState
from orchestrator.values import MacAddress


@contextmanager
def _parts_only(package: str) -> Iterator[None]:
    """Within it, modules of a package are imported without what the package's own ``__init__`` imports beside them.

    Afterwards the package can be imported as a whole, as by anybody who has not been here.
    """
    spec = importlib.util.find_spec(package)
    if package in sys.modules or spec is None:
        yield  # it is there as a whole already, or not at all: then its modules say so
        return
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[package]


# pyroute2's `__init__` imports its databases, file servers, packet filters and more: 64 modules that nothing here needs, which
# took 4 MB of the manager's memory for good (pyroute2 0.9.7).
with _parts_only("pyroute2"):
    from pyroute2 import netns as namespaces
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.rtnl import RTMGRP_LINK

_AF_BRIDGE = 7  # include/linux/socket.h
_IFF_UP = 1  # include/uapi/linux/if.h
_RTEXT_FILTER_VF = 1  # include/uapi/linux/rtnetlink.h: without it the kernel leaves the VFs out
_NO_MAC = "00:00:00:00:00:00"
# include/uapi/linux/if_bridge.h, BRIDGE_MODE_VEB and _VEPA; 0xffff is BRIDGE_MODE_UNDEF
_HWMODES = {"veb": 0, "vepa": 1}
_UNKNOWN = 0xFFFF_FFFF
_VF_LINK_STATES = {0: "auto", 1: "enable", 2: "disable"}
_HINTS = {EPERM: "run as root", EEXIST: "the name is taken; look with: ip link show, ip netns list"}


def read_links(*, netns: str | None = None) -> tuple[Link, ...]:
    """All interfaces, in our network namespace or in the named one.

    Raises:
        HostError: no such network namespace (ENOENT), or the kernel refused.
    """
    with _socket("read the network interfaces", netns) as ipr:
        return _read(ipr)


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
            number = _errno(error)
            if number != ENOBUFS:
                raise HostError("cannot watch the network interfaces", _HINTS.get(number, ""), number) from None
        yield from [link.name for link in read_links()]


def reset_vf(interface: str, index: int, mac: MacAddress | None) -> None:
    """Makes the PF enforce for a VF what it does for a new one, with this address, and reads back: no port VLAN, no rate, spoof
    check on, no trust, the PF's link state. A bound VF driver learns its address at its next reset.

    Only what is not so is written: many drivers can't do all of it.

    Args:
        interface: the PF's interface.
        mac: None for no address (the VF driver then makes one up).

    Raises:
        HostError: no such interface (ENODEV) or VF (EINVAL), the driver refused, or has not taken what was set, with both values.
    """
    what = f"set VF {index} of {interface}"
    before = _find_vf(interface, index, what)
    wanted = before.as_new(mac)
    for attribute, value in _list_changes(before, wanted):
        hint = f"its driver does not do this, or not now: some want {interface} to have its link for it"
        with _socket(f"{what}: {attribute} {value}", None, {EINVAL: hint, EOPNOTSUPP: hint}) as ipr:
            # One attribute a request: the kernel applies them one by one, so an error would not tell which it was.
            ipr.link("set", index=_index(ipr, interface, what), vf={"vf": index, attribute: value})
    differences = _find_vf(interface, index, what).list_differences(wanted)
    if differences:
        raise HostError(f"VF {index} of {interface} did not take all that it was to: its {'; its '.join(differences)}")


def set_link_up(interface: str, *, up: bool, netns: str | None = None) -> None:
    """Sets an interface administratively up or down, and reads back. Its carrier may follow seconds later.

    Raises:
        HostError: no such interface (ENODEV), or its driver refused.
    """
    what = f"set {interface} {'up' if up else 'down'}"
    with _socket(what, netns) as ipr:
        ipr.link("set", index=_index(ipr, interface, what), state="up" if up else "down")
    if _find(read_links(netns=netns), interface, what).up != up:
        raise HostError(f"{interface} was to be {'up' if up else 'down'}, but is not", "something else sets it: NetworkManager?")


def read_hwmode(interface: str) -> str | None:
    """How the NIC switches between its VFs: "veb" (inside), "vepa" (all goes out); None where the driver does not tell (igb).

    Raises:
        HostError: no such interface (ENODEV).
    """
    what = f"read the switching mode of {interface}"
    with _socket(what) as ipr:
        index = _index(ipr, interface, what)
        for message in ipr.link("dump", family=_AF_BRIDGE):
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
    with _socket(what, None, hints) as ipr:
        # RTM_SETLINK, AF_BRIDGE, IFLA_AF_SPEC {IFLA_BRIDGE_FLAGS self, IFLA_BRIDGE_MODE}: the driver's ndo_bridge_setlink.
        ipr.vlan_filter("add", index=_index(ipr, interface, what), vlan_flags="self", mode=_HWMODES[mode])
    actual = read_hwmode(interface)
    if actual != mode:
        raise HostError(f"{interface} was to have hwmode {mode}, but has {actual or 'none'}")


def netns_exists(name: str) -> bool:
    """Whether there is a network namespace of that name (ip-netns(8))."""
    return name in namespaces.listnetns()


def create_netns(name: str) -> None:
    """Makes a named network namespace, as `ip netns add` does.

    Raises:
        HostError: the name is taken (EEXIST), or not root (EPERM).
    """
    if netns_exists(name):
        raise HostError(f"cannot make the network namespace {name}", _HINTS[EEXIST], EEXIST)
    try:
        namespaces.create(name)
    except OSError as error:
        if netns_exists(name):
            # It makes the mount point first; without the mount that would look like a namespace.
            with suppress(OSError):
                namespaces.remove(name)
        raise HostError(f"cannot make the network namespace {name}", _HINTS.get(_errno(error), ""), _errno(error)) from None


def delete_netns(name: str) -> None:
    """Removes a named network namespace. Its virtual interfaces go with the last process in it; physical ones return.

    Raises:
        HostError: there is none (ENOENT), or not root (EPERM).
    """
    if not netns_exists(name):
        raise HostError(f"cannot remove the network namespace {name}", "look with: ip netns list", ENOENT)
    try:
        namespaces.remove(name)
    except OSError as error:
        raise HostError(f"cannot remove the network namespace {name}", _HINTS.get(_errno(error), ""), _errno(error)) from None


def create_bridge(name: str, netns: str | None = None) -> None:
    """Makes a bridge and sets it up: no spanning tree (a port forwards at once), no multicast snooping (all is flooded).

    Raises:
        HostError: the name is taken (EEXIST).
    """
    what = f"make the bridge {name}"
    with _socket(what, netns) as ipr:
        ipr.link("add", ifname=name, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
    set_link_up(name, up=True, netns=netns)


def add_port(bridge: str, interface: str, netns: str | None = None) -> None:
    """Makes an interface a port of a bridge, and sets it up.

    Raises:
        HostError: no such bridge or interface (ENODEV), or the interface is a port of another one (EBUSY).
    """
    what = f"make {interface} a port of the bridge {bridge}"
    with _socket(what, netns) as ipr:
        links = _read(ipr)
        master, port = _find(links, bridge, what), _find(links, interface, what)
        # The kernel would silently take it out of the other bridge: do_set_master() in net/core/rtnetlink.c.
        if port.master not in (None, bridge):
            raise HostError(f"cannot {what}: it is one of {port.master}", f"ip link set {interface} nomaster takes it out", EBUSY)
        ipr.link("set", index=port.index, master=master.index, state="up")
    actual = _find(read_links(netns=netns), interface, what).master
    if actual != bridge:
        raise HostError(f"{interface} was to be a port of {bridge}, but is one of {actual or 'nothing'}")


def set_hairpin(interface: str, netns: str | None = None, *, on: bool) -> None:
    """Lets a bridge port send a frame back out where it came in (reflective relay, IEEE 802.1Qbg), and reads back.

    Raises:
        HostError: no such interface (ENODEV), or it is no bridge port.
    """
    what = f"switch hairpin {'on' if on else 'off'} on {interface}"
    no_port = f"{interface} is no port of a bridge"
    with _socket(what, netns, {EINVAL: no_port, EOPNOTSUPP: no_port}) as ipr:
        # IFLA_BRPORT_MODE is the hairpin flag (net/bridge/br_netlink.c).
        ipr.brport("set", index=_index(ipr, interface, what), mode=int(on))
    if read_hairpin(interface, netns) != on:
        raise HostError(f"hairpin on {interface} was to be {'on' if on else 'off'}, but is not")


def read_hairpin(interface: str, netns: str | None = None) -> bool:
    """Whether a bridge port sends frames back out where they came in.

    Raises:
        HostError: no such interface (ENODEV), or it is no bridge port (EINVAL).
    """
    what = f"read the hairpin flag of {interface}"
    with _socket(what, netns) as ipr:
        index = _index(ipr, interface, what)
        for message in ipr.link("dump", family=_AF_BRIDGE):
            if message["index"] == index and (port := message.get_attr("IFLA_PROTINFO")) is not None:
                return bool(port.get_attr("IFLA_BRPORT_MODE"))
    raise HostError(f"cannot {what}", f"{interface} is no port of a bridge", EINVAL)


def move_to_netns(interface: str, netns: str) -> None:
    """Moves an interface from our network namespace into a named one. It arrives there down, and without addresses.

    Raises:
        HostError: no such interface (ENODEV) or namespace (ENOENT), the name is taken there (EEXIST), or it cannot move (EINVAL).
    """
    what = f"move {interface} to the network namespace {netns}"
    _check_netns(what, netns)
    with _socket(what) as ipr:
        ipr.link("set", index=_index(ipr, interface, what), net_ns_fd=netns)
    _find(read_links(netns=netns), interface, what)


@contextmanager
def _socket(what: str, netns: str | None = None, hints: dict[int, str] | None = None) -> Iterator[Any]:
    """A netlink socket for one job; errors inside become one HostError that starts with "cannot <what>"."""
    _check_netns(what, netns)
    try:
        # flags=0, or pyroute2 would make a namespace that is missing.
        with IPRoute(netns=netns, flags=0) as ipr:
            yield ipr
    except (NetlinkError, OSError) as error:
        number = _errno(error)
        where = f" in the network namespace {netns}" if netns else ""
        raise HostError(f"cannot {what}{where}", {**_HINTS, **(hints or {})}.get(number, ""), number) from None


def _check_netns(what: str, netns: str | None) -> None:
    if netns is not None and not netns_exists(netns):
        raise HostError(f"cannot {what}: there is no network namespace {netns}", "look with: ip netns list", ENOENT)


def _errno(error: Exception) -> int:
    return int(error.code if isinstance(error, NetlinkError) else getattr(error, "errno", 0) or 0)


def _read(ipr: Any) -> tuple[Link, ...]:
    messages = list(ipr.link("dump", ext_mask=_RTEXT_FILTER_VF))
    names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in messages}
    return tuple(_parse_link(message, names) for message in messages)


def _find(links: tuple[Link, ...], interface: str, what: str) -> Link:
    for link in links:
        if link.name == interface:
            return link
    raise HostError(f"cannot {what}: there is no interface {interface}", "look with: ip link show", ENODEV)


def _find_vf(interface: str, index: int, what: str) -> VfState:
    for vf in _find(read_links(), interface, what).vfs:
        if vf.index == index:
            return vf
    raise HostError(f"cannot {what}", f"{interface} has no VF {index}", EINVAL)


def _list_changes(before: VfState, after: VfState) -> list[tuple[str, object]]:
    """What differs, as pyroute2 wants it; the address last, since a VF that is trusted may still change its own."""
    rates = {"min_tx_rate": after.min_rate, "max_tx_rate": after.max_rate}
    link_states = {name: number for number, name in _VF_LINK_STATES.items()}
    changes: list[tuple[str, object]] = []
    if before.trust != after.trust:
        changes.append(("trust", int(bool(after.trust))))
    if before.spoof_check != after.spoof_check:
        changes.append(("spoofchk", int(bool(after.spoof_check))))
    if (before.vlan, before.qos) != (after.vlan, after.qos):
        changes.append(("vlan", {"vlan": after.vlan, "qos": after.qos}))
    if (before.min_rate, before.max_rate) != (after.min_rate, after.max_rate):
        changes.append(("rate", rates))
    if before.link_state != after.link_state:
        changes.append(("link_state", link_states[after.link_state]))
    if before.mac != after.mac:
        changes.append(("mac", str(after.mac or _NO_MAC)))
    return changes


def _index(ipr: Any, interface: str, what: str) -> int:
    return _find(_read(ipr), interface, what).index


def _parse_link(message: Any, names: dict[int, str]) -> Link:
    vfs = message.get_attr("IFLA_VFINFO_LIST")
    return Link(
        name=message.get_attr("IFLA_IFNAME"),
        index=message["index"],
        mac=_parse_mac(message.get_attr("IFLA_ADDRESS")),
        up=bool(message["flags"] & _IFF_UP),
        carrier=bool(message.get_attr("IFLA_CARRIER")),
        master=names.get(message.get_attr("IFLA_MASTER")),
        kind=message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND"),
        vfs=tuple(map(_parse_vf, vfs.get_attrs("IFLA_VF_INFO"))) if vfs is not None else (),
    )


def _parse_vf(info: Any) -> VfState:
    def field(attribute: str, key: str) -> int:
        value = info.get_attr(attribute)
        return int(value[key]) if value is not None else 0

    def flag(attribute: str, key: str) -> bool | None:
        # All ones where the driver does not tell (rtnl_fill_vfinfo(), -1).
        value = info.get_attr(attribute)
        return None if value is None or int(value[key]) == _UNKNOWN else bool(value[key])

    address = info.get_attr("IFLA_VF_MAC")
    return VfState(
        index=int(address["vf"]),
        mac=_parse_mac(address["mac"]),
        vlan=field("IFLA_VF_VLAN", "vlan"),
        qos=field("IFLA_VF_VLAN", "qos"),
        min_rate=field("IFLA_VF_RATE", "min_tx_rate"),
        max_rate=field("IFLA_VF_RATE", "max_tx_rate"),
        spoof_check=flag("IFLA_VF_SPOOFCHK", "spoofchk"),
        trust=flag("IFLA_VF_TRUST", "trust"),
        link_state=_VF_LINK_STATES.get(field("IFLA_VF_LINK_STATE", "link_state"), "auto"),
    )


def _parse_mac(text: str | None) -> MacAddress | None:
    """None for what is no unicast Ethernet address: all zeros, a tunnel's IP address, InfiniBand's 20 bytes."""
    try:
        return MacAddress.parse(text or _NO_MAC)
    except RequestError:
        return None
