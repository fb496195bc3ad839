"""The external switch of a lab: a bridge in its own network namespace, with the lab's NIC as the only port.

The port is a tap. The keeper creates it, passes the descriptor to QEMU and moves the interface into the namespace; QEMU stays
outside, where its SSH forward listens. The tap is not persistent: the kernel removes it with the last descriptor.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass

from orchestrator.errors import Conflict, HostError
from orchestrator.host import netlink
from orchestrator.switches.linux_bridge import LinuxBridge

BRIDGE = "br0"
_TUN = "/dev/net/tun"
# include/uapi/linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


@dataclass(frozen=True)
class LabPort:
    netns: str
    interface: str

    @property
    def switch(self) -> LinuxBridge:
        """The driver that the manager uses too."""
        return LinuxBridge(BRIDGE, self.netns)


def netns_of(lab: str) -> str:
    return f"nohype-{lab}"


def port(lab: str) -> LabPort:
    """The switch port of a lab's NIC. Raises HostError if the switch does not exist or does not have exactly one port."""
    netns = netns_of(lab)
    if not netlink.netns_exists(netns):
        raise HostError(
            f"lab {lab} has no switch: network namespace {netns} does not exist", f"start the lab with `nohype lab up {lab}`"
        )
    ports = [found.name for found in netlink.read_bridge(BRIDGE, netns).ports]
    if len(ports) != 1:
        raise HostError(f"the switch of lab {lab}: expected one port, found {', '.join(ports) or 'none'}")
    return LabPort(netns, ports[0])


def create_switch(lab: str) -> int:
    """Creates the switch with hairpin on (reflective relay, IEEE 802.1Qbg). Returns the descriptor of the tap, for QEMU."""
    netns = netns_of(lab)
    if netlink.netns_exists(netns):
        raise Conflict(
            f"network namespace {netns} exists already and does not belong to a lab",
            f"choose another name for the lab, or remove the namespace with `ip netns delete {netns}`",
        )
    netlink.create_netns(netns)
    descriptor = -1
    try:
        descriptor, tap = open_tap()
        netlink.create_bridge(BRIDGE, netns)
        netlink.move_to_netns(tap, netns)
        netlink.add_port(BRIDGE, tap, netns)
        LabPort(netns, tap).switch.set_hairpin(tap, on=True)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        delete_switch(lab)
        raise
    return descriptor


def delete_switch(lab: str) -> None:
    if netlink.netns_exists(netns_of(lab)):
        netlink.delete_netns(netns_of(lab))


def open_tap() -> tuple[int, str]:
    """Creates a tap with a free name (Documentation/networking/tuntap.rst). Returns its descriptor and its name."""
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "run as root and load the module `tun`; in a container, pass /dev/net/tun in"
        raise HostError(f"cannot open {_TUN}", hint, error.errno or 0) from None
    try:
        # VNET_HDR: QEMU leaves checksums and segmentation to the receiver, as with a tap that it creates itself.
        request = struct.pack("16sH22x", b"nhtap%d", _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        answer = fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError as error:
        os.close(descriptor)
        raise HostError(f"cannot create a tap with {_TUN}", "run as root (CAP_NET_ADMIN)", error.errno or 0) from None
    return descriptor, answer[:16].rstrip(b"\0").decode()
