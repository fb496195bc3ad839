"""macvtap-vepa: the guest's NIC is a macvtap in VEPA mode. The kernel's driver macvlan sends each frame out of the uplink, also
to a sibling, and does not give a frame that comes back to its sender.

The rules are on the egress hook of the macvtap: a frame that the guest sends leaves the host's side of the device (Linux 5.16).
"""

from __future__ import annotations

from errno import EEXIST

from orchestrator.errors import HostError
from orchestrator.host.edge.base import NO_UPLINKS, Tap, build_sender_rules, diff_rules, find_link, name_table
from orchestrator.host.root import Chain, HostRoot
from orchestrator.model.topology import Interface, Link

KIND = "macvtap"
PROMISCUOUS = False  # the driver macvlan adds the guests' addresses to the uplink's filter
_MODE = "vepa"


def check_uplink(interface: Interface) -> str:
    if interface.kind in NO_UPLINKS:
        return f"{interface.name} is of kind {interface.kind}, which cannot carry a macvtap"
    if interface.master:
        return f"{interface.name} is a port of {interface.master}, and a macvtap needs an uplink that is not a port"
    return ""


def create(host: HostRoot, tap: Tap) -> None:
    if find_link(host, tap.name):
        hint = f"remove it if no program uses it: ip link delete {tap.name}"
        raise HostError(f"cannot create macvtap {tap.name}: the interface exists", hint, EEXIST)
    host.net.create_macvtap(tap.name, tap.uplink, tap.mac)
    host.net.replace_table(name_table(tap.name), _build_chain(tap))
    host.net.set_link_up(tap.name, up=True)
    if findings := diff(host, tap):
        hint = "check for a program that manages network interfaces, such as NetworkManager or systemd-networkd"
        raise HostError(f"macvtap {tap.name} is not as it was created: {'; '.join(findings)}", hint)


def remove(host: HostRoot, tap: Tap) -> None:
    if link := find_link(host, tap.name):
        if (link.kind, link.mac) != (KIND, tap.mac):
            what = f"{link.kind or 'physical'} with address {link.mac}, expected {KIND} with {tap.mac}"
            raise HostError(
                f"cannot remove macvtap {tap.name}: the interface is {what}",
                "remove it by hand, and clear the guest with --force",
            )
        host.net.delete_link(tap.name)
    host.net.delete_table(name_table(tap.name))


def restore(host: HostRoot, tap: Tap) -> None:
    link = find_link(host, tap.name)
    if link and link.kind != KIND:
        return  # another program's interface: `diff` reports it
    host.net.restore_macvtap(tap.name)
    host.net.replace_table(name_table(tap.name), _build_chain(tap))
    if link and not link.up:
        host.net.set_link_up(tap.name, up=True)


def diff(host: HostRoot, tap: Tap) -> tuple[str, ...]:
    link = find_link(host, tap.name)
    if link is None:
        return (f"{tap.name} does not exist",)
    uplink = find_link(host, tap.uplink)
    pairs = [
        ("kind", link.kind, KIND), ("mode", link.mode or None, _MODE), ("uplink", link.parent, tap.uplink),
        ("address", link.mac, tap.mac), ("state", "up" if link.up else "down", "up"),
        ("reception of all multicast", "on" if link.all_multicast else "off", "on"),
        # Lowering the MTU of an uplink lowers that of its macvtaps; raising it does not raise them.
        ("MTU", link.mtu, uplink.mtu if uplink else link.mtu),
    ]  # fmt: skip
    findings = [f"{tap.name}: {what} is {now or 'none'}, expected {wanted}" for what, now, wanted in pairs if now != wanted]
    return (*findings, *diff_rules(host, tap, _build_chain(tap)))


def find_uplink(_host: HostRoot, link: Link) -> str:
    return link.parent or ""


def _build_chain(tap: Tap) -> Chain:
    return Chain("egress", "egress", tap.name, build_sender_rules(tap.mac))
