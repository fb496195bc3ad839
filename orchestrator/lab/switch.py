"""The external switch of a lab: a bridge in a network namespace of its own, with the lab's NIC as its one port.

The port's cable is a tap. We make it, give QEMU the descriptor and move the interface into the namespace; QEMU itself stays
outside, where its SSH forward listens. The tap is not persistent: it goes with the last descriptor, whoever held that.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass

from orchestrator.errors import Conflict, HostError
from orchestrator.host import netlink

BRIDGE = "br0"
_TUN = "/dev/net/tun"
# include/uapi/linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


@dataclass(frozen=True)
class SwitchPort:
    """Where to look at the switch: ``interface`` is a port of the bridge ``bridge`` in the network namespace ``netns``."""

    netns: str
    interface: str
    bridge: str = BRIDGE


def netns_of(lab: str) -> str:
    """Name of the network namespace of a lab's switch."""
    return f"nohype-{lab}"


def port(lab: str) -> SwitchPort:
    """The switch port that a lab's NIC is plugged into.

    Raises:
        HostError: the lab has no switch, or nothing is plugged in.
    """
    netns = netns_of(lab)
    if not netlink.netns_exists(netns):
        raise HostError(f"the lab {lab} has no switch: there is no network namespace {netns}", f"`nohype lab up {lab}` makes it")
    ports = [link.name for link in netlink.read_links(netns=netns) if link.master == BRIDGE]
    if len(ports) != 1:
        raise HostError(f"the switch of the lab {lab} was to have one port, but has {', '.join(ports) or 'none'}")
    return SwitchPort(netns, ports[0])


def create_switch(lab: str) -> int:
    """Makes the switch, hairpin on (a frame may leave by the port that it came in by: IEEE 802.1Qbg reflective relay).

    Returns:
        The descriptor of the tap, for QEMU. The tap ends with it.

    Raises:
        Conflict: a network namespace of that name is there already.
        HostError: no /dev/net/tun, no permission, or the kernel lacks bridges.
    """
    netns = netns_of(lab)
    if netlink.netns_exists(netns):
        raise Conflict(
            f"the network namespace {netns}, which the switch needs, exists already and is of no lab",
            f"name the lab differently, or remove it: ip netns delete {netns}",
        )
    netlink.create_netns(netns)
    descriptor = -1
    try:
        descriptor, tap = open_tap()
        netlink.create_bridge(BRIDGE, netns)
        netlink.move_to_netns(tap, netns)
        netlink.add_port(BRIDGE, tap, netns)
        netlink.set_hairpin(tap, netns, on=True)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        delete_switch(lab)
        raise
    return descriptor


def delete_switch(lab: str) -> None:
    """Removes the switch; nothing is done if there is none."""
    if netlink.netns_exists(netns_of(lab)):
        netlink.delete_netns(netns_of(lab))


def open_tap() -> tuple[int, str]:
    """Makes a tap with a free name (Documentation/networking/tuntap.rst).

    Returns:
        The descriptor, and the interface's name.

    Raises:
        HostError: with the kernel's errno.
    """
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "run as root; in a container pass /dev/net/tun in, else `modprobe tun`"
        raise HostError(f"cannot open {_TUN}", hint, error.errno or 0) from None
    try:
        # VNET_HDR: QEMU then leaves checksums and segmentation to the receiver, as it does with a tap of its own.
        request = struct.pack("16sH22x", b"nhtap%d", _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        answer = fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError as error:
        os.close(descriptor)
        raise HostError(f"cannot make a tap with {_TUN}", "run as root (CAP_NET_ADMIN)", error.errno or 0) from None
    return descriptor, answer[:16].rstrip(b"\0").decode()
