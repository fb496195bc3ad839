"""Linux bridges and their ports."""

from __future__ import annotations

from errno import EBUSY, EINVAL, EOPNOTSUPP

from orchestrator.errors import HostError
from orchestrator.host.netlink.links import AF_BRIDGE, read_links, set_link_up
from orchestrator.host.netlink.sockets import find_index, find_link, opened, read_all


def create_bridge(name: str, netns: str | None = None) -> None:
    """Makes a bridge and sets it up: no spanning tree (a port forwards at once), no multicast snooping (all is flooded).

    Raises:
        HostError: the name is taken (EEXIST).
    """
    what = f"make the bridge {name}"
    with opened(what, netns) as ipr:
        ipr.link("add", ifname=name, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
    set_link_up(name, up=True, netns=netns)


def add_port(bridge: str, interface: str, netns: str | None = None) -> None:
    """Makes an interface a port of a bridge, and sets it up.

    Raises:
        HostError: no such bridge or interface (ENODEV), or the interface is a port of another one (EBUSY).
    """
    what = f"make {interface} a port of the bridge {bridge}"
    with opened(what, netns) as ipr:
        links = read_all(ipr)
        master, port = find_link(links, bridge, what), find_link(links, interface, what)
        # The kernel would silently take it out of the other bridge: do_set_master() in net/core/rtnetlink.c.
        if port.master not in (None, bridge):
            raise HostError(f"cannot {what}: it is one of {port.master}", f"ip link set {interface} nomaster takes it out", EBUSY)
        ipr.link("set", index=port.index, master=master.index, state="up")
    actual = find_link(read_links(netns=netns), interface, what).master
    if actual != bridge:
        raise HostError(f"{interface} was to be a port of {bridge}, but is one of {actual or 'nothing'}")


def set_hairpin(interface: str, netns: str | None = None, *, on: bool) -> None:
    """Lets a bridge port send a frame back out where it came in (reflective relay, IEEE 802.1Qbg), and reads back.

    Raises:
        HostError: no such interface (ENODEV), or it is no bridge port.
    """
    what = f"switch hairpin {'on' if on else 'off'} on {interface}"
    no_port = f"{interface} is no port of a bridge"
    with opened(what, netns, {EINVAL: no_port, EOPNOTSUPP: no_port}) as ipr:
        # IFLA_BRPORT_MODE is the hairpin flag (net/bridge/br_netlink.c).
        ipr.brport("set", index=find_index(ipr, interface, what), mode=int(on))
    if read_hairpin(interface, netns) != on:
        raise HostError(f"hairpin on {interface} was to be {'on' if on else 'off'}, but is not")


def read_hairpin(interface: str, netns: str | None = None) -> bool:
    """Whether a bridge port sends frames back out where they came in.

    Raises:
        HostError: no such interface (ENODEV), or it is no bridge port (EINVAL).
    """
    what = f"read the hairpin flag of {interface}"
    with opened(what, netns) as ipr:
        index = find_index(ipr, interface, what)
        for message in ipr.link("dump", family=AF_BRIDGE):
            if message["index"] == index and (port := message.get_attr("IFLA_PROTINFO")) is not None:
                return bool(port.get_attr("IFLA_BRPORT_MODE"))
    raise HostError(f"cannot {what}", f"{interface} is no port of a bridge", EINVAL)
