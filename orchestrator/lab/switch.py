"""The external switch of a lab: a bridge in its own network namespace, with the lab's NIC as a port.

A second lab can join the switch, as another host behind it. The switch exists as long as any of its labs.

The port is a tap. The keeper creates it, passes the descriptor to QEMU and moves the interface into the namespace; QEMU stays
outside, where its SSH forward listens. The tap is not persistent: the kernel removes it with the last descriptor.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from orchestrator.errors import Conflict, HostError, NotFound
from orchestrator.host import netlink
from orchestrator.lab.paths import LabDir, find_state, is_locked, list_folders
from orchestrator.locks import lock_file
from orchestrator.switches.linux_bridge import LinuxBridge

BRIDGE = "br0"
_TUN = "/dev/net/tun"
# include/uapi/linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_PORT = "swp{}"


@dataclass(frozen=True)
class LabPort:
    netns: str
    interface: str

    @property
    def switch(self) -> LinuxBridge:
        """The driver that the manager uses too."""
        return LinuxBridge(BRIDGE, self.netns)


def netns_of(switch: str) -> str:
    """Of the switch that the lab of this name has created."""
    return f"nohype-{switch}"


def port(lab: str) -> LabPort:
    """The switch port of a lab's NIC. Raises HostError if the switch does not have it."""
    found = name_port(lab)
    if not netlink.netns_exists(found.netns):
        raise HostError(
            f"lab {lab} has no switch: network namespace {found.netns} does not exist",
            f"start the lab with `nohype lab up {lab}`",
        )
    ports = [one.name for one in netlink.read_bridge(BRIDGE, found.netns).ports]
    if found.interface not in ports:
        raise HostError(f"the switch of lab {lab}: expected port {found.interface}, found {', '.join(ports) or 'none'}")
    return found


def name_port(lab: str) -> LabPort:
    """As ``port``, also while the switch does not have it. Raises HostError for a lab without a NIC."""
    state = find_state(LabDir(lab))
    if state is None or not state.switch_port:
        raise HostError(f"lab {lab} has no switch", f"start the lab with `nohype lab up {lab}` and a spec with vfs")
    return LabPort(netns_of(state.switch), state.switch_port)


def create_port(folder: LabDir, switch: str) -> tuple[int, str]:
    """Adds a port for this lab with hairpin on (reflective relay, IEEE 802.1Qbg), and creates the switch unless another lab has.

    Returns the descriptor of the tap, for QEMU, and the name of the port. ``delete_port`` is its undo. Raises NotFound if the
    switch is to be that of a lab that is not up.
    """
    netns = netns_of(switch)
    with _changing(folder.base):
        users = _list_users(folder, switch)
        if users:
            _marker(folder).write_text(switch)
            return _add_port(netns)
        if switch != folder.name:
            raise NotFound(f"no lab has a switch named {switch}", f"start lab {switch} first: `nohype lab up {switch}`")
        if netlink.netns_exists(netns):
            raise Conflict(
                f"network namespace {netns} exists already and does not belong to a lab",
                f"choose another name for the lab, or remove the namespace with `ip netns delete {netns}`",
            )
        _marker(folder).write_text(switch)
        netlink.create_netns(netns)
        try:
            netlink.create_bridge(BRIDGE, netns)
            return _add_port(netns)
        except BaseException:
            netlink.delete_netns(netns)
            raise


def delete_port(folder: LabDir) -> None:
    """After the lab's QEMU has ended, and with it the port: deletes the switch unless another lab uses it. Without the marker of
    ``create_port`` the lab has none.
    """
    switch = _find_switch(folder)
    if switch is None:
        return
    with _changing(folder.base):
        if not _list_users(folder, switch) and netlink.netns_exists(netns_of(switch)):
            netlink.delete_netns(netns_of(switch))
        # The lab is alive for a moment still: another one must not join what is deleted.
        _marker(folder).unlink(missing_ok=True)


def _add_port(netns: str) -> tuple[int, str]:
    descriptor, tap = open_tap()
    try:
        netlink.move_to_netns(tap, netns)
        used = {link.name for link in netlink.read_links(netns=netns)}
        name = next(name for number in count(1) if (name := _PORT.format(number)) not in used)
        netlink.rename_link(tap, name, netns)
        netlink.add_port(BRIDGE, name, netns)
        LabPort(netns, name).switch.set_hairpin(name, on=True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, name


def _list_users(folder: LabDir, switch: str) -> list[str]:
    """Other labs that are alive and have a port of the switch."""
    others = [other for other in list_folders(folder.base) if other.name != folder.name]
    return [other.name for other in others if _find_switch(other) == switch and is_locked(other)]


def _find_switch(folder: LabDir) -> str | None:
    """The switch whose port the lab has; None without one. The files of another lab can be removed at any time."""
    try:
        return _marker(folder).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _marker(folder: LabDir) -> Path:
    return folder.path / "switch"


@contextmanager
def _changing(base: Path) -> Iterator[None]:
    """Of all labs: a lab may join a switch while the last lab of the switch ends."""
    descriptor = lock_file(base / ".switches", wait=True)
    try:
        yield
    finally:
        os.close(descriptor)


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
