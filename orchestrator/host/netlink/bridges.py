"""Linux bridges and their ports."""

from __future__ import annotations

from errno import EBUSY, EINVAL, EOPNOTSUPP

from orchestrator.errors import HostError
from orchestrator.host.netlink.links import AF_BRIDGE, read_links, set_link_up
from orchestrator.host.netlink.sockets import find_index, find_link, opened, read_all


def create_bridge(name: str, netns: str | None = None) -> None:
    """No spanning tree: ports forward immediately. No multicast snooping: all multicast is flooded."""
    what = f"create bridge {name}"
    with opened(what, netns) as ipr:
        ipr.link("add", ifname=name, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
    set_link_up(name, up=True, netns=netns)


def add_port(bridge: str, interface: str, netns: str | None = None) -> None:
    """Also sets the interface up. Raises HostError (EBUSY) if it is a port of another bridge."""
    what = f"add {interface} to bridge {bridge}"
    with opened(what, netns) as ipr:
        links = read_all(ipr)
        master, port = find_link(links, bridge, what), find_link(links, interface, what)
        # The kernel silently removes it from the other bridge: do_set_master() in net/core/rtnetlink.c.
        if port.master not in (None, bridge):
            hint = f"remove it with `ip link set {interface} nomaster`"
            raise HostError(f"cannot {what}: it is a port of {port.master}", hint, EBUSY)
        ipr.link("set", index=port.index, master=master.index, state="up")
    actual = find_link(read_links(netns=netns), interface, what).master
    if actual != bridge:
        raise HostError(f"{interface}: requested bridge {bridge}, kernel set {actual or 'none'}")


def set_hairpin(interface: str, netns: str | None = None, *, on: bool) -> None:
    """Reflective relay (IEEE 802.1Qbg): the port sends a frame back out of the port it came in on."""
    what = f"switch hairpin {'on' if on else 'off'} on {interface}"
    no_port = f"{interface} is not a bridge port"
    with opened(what, netns, {EINVAL: no_port, EOPNOTSUPP: no_port}) as ipr:
        # IFLA_BRPORT_MODE is the hairpin flag (net/bridge/br_netlink.c).
        ipr.brport("set", index=find_index(ipr, interface, what), mode=int(on))
    if read_hairpin(interface, netns) != on:
        raise HostError(f"hairpin on {interface} is {'off' if on else 'on'}, expected {'on' if on else 'off'}")


def read_hairpin(interface: str, netns: str | None = None) -> bool:
    """Raises HostError if the interface does not exist (ENODEV) or is not a bridge port (EINVAL)."""
    what = f"read the hairpin flag of {interface}"
    with opened(what, netns) as ipr:
        index = find_index(ipr, interface, what)
        for message in ipr.link("dump", family=AF_BRIDGE):
            if message["index"] == index and (port := message.get_attr("IFLA_PROTINFO")) is not None:
                return bool(port.get_attr("IFLA_BRPORT_MODE"))
    raise HostError(f"cannot {what}", f"{interface} is not a bridge port", EINVAL)
