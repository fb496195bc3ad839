"""nft-vepa: the guest's NIC is a tap, and rules of nftables on the ingress hooks of tap and uplink carry every frame.

- From the guest: each frame that it may send goes out of the uplink, also to a guest of the same host. All others are dropped.
- To the guest: what arrives on the uplink for its address, and a copy of each broadcast and multicast that it did not send.

No bridge forwards anything. The rules of a tap are one table, so guests do not share one. They name interfaces by index: a tap or
uplink that is created again needs them again. If the rules are gone, a frame of the guest enters the tap's bridge, which is down
and has no other port (``netlink.create_tap``).
"""

from __future__ import annotations

from errno import EBUSY, EEXIST

from orchestrator.errors import HostError
from orchestrator.host.edge.base import NO_UPLINKS, Tap, build_sender_rules, diff_rules, ether, find_link, match, name_table
from orchestrator.host.root import Chain, HostRoot, Rule
from orchestrator.model.topology import Interface, Link
from orchestrator.values import MacAddress

KIND = "tun"
PROMISCUOUS = True
_FROM_GUEST, _TO_GUEST = "from-guest", "to-guest"
_ABOVE = ("macvtap", "macvlan", "ipvtap", "ipvlan")


def check_uplink(interface: Interface) -> str:
    if interface.kind in NO_UPLINKS:
        return f"{interface.name} is of kind {interface.kind}, whose frames do not leave the host directly"
    if interface.master:
        return f"{interface.name} is a port of {interface.master}, whose frames the rules would take"
    return ""


def create(host: HostRoot, tap: Tap) -> None:
    links = host.net.read_links()
    for name in (tap.name, _name_drain(tap)):
        if any(link.name == name for link in links):
            hint = f"remove it if no program uses it: ip link delete {name}"
            raise HostError(f"cannot create tap {tap.name}: the interface {name} exists", hint, EEXIST)
    _check_above(links, tap)
    host.net.create_tap(tap.name, tap.uplink, _address_of_host(tap.mac), _name_drain(tap))
    host.net.replace_table(name_table(tap.name), *_build_chains(tap))
    host.net.set_link_up(tap.name, up=True)
    if (link := find_link(host, tap.name)) and link.mac != _address_of_host(tap.mac):
        # udev gives each new interface with a random address another one (systemd.link(5), MACAddressPolicy=persistent). It may
        # have looked before the address was set, and have written afterwards. It does so once.
        host.net.restore_tap(tap.name, tap.uplink, _address_of_host(tap.mac), _name_drain(tap))
    if findings := diff(host, tap):
        hint = "check for a program that manages network interfaces, such as NetworkManager or systemd-networkd"
        raise HostError(f"tap {tap.name} is not as it was created: {'; '.join(findings)}", hint)


def remove(host: HostRoot, tap: Tap) -> None:
    for name, kind in ((tap.name, KIND), (_name_drain(tap), "bridge")):
        if link := find_link(host, name):
            # The only port of the tap's bridge is the tap, also if udev has changed its address.
            is_port = (name, link.master) == (tap.name, _name_drain(tap))
            if link.kind != kind or not (is_port or link.mac == _address_of_host(tap.mac)):
                what = f"{link.kind or 'physical'} with address {link.mac}, expected {kind} with {_address_of_host(tap.mac)}"
                hint = "remove it by hand, and clear the guest with --force"
                raise HostError(f"cannot remove tap {tap.name}: the interface {name} is {what}", hint)
            host.net.delete_link(name)
    host.net.delete_table(name_table(tap.name))


def restore(host: HostRoot, tap: Tap) -> None:
    link, uplink, drain = (find_link(host, name) for name in (tap.name, tap.uplink, _name_drain(tap)))
    if link is None or uplink is None or link.kind != KIND or (drain and drain.kind != "bridge"):
        return  # `diff` reports it
    if not uplink.promiscuous:
        host.net.set_promiscuous(tap.uplink, on=True)
    host.net.restore_tap(tap.name, tap.uplink, _address_of_host(tap.mac), _name_drain(tap))
    host.net.replace_table(name_table(tap.name), *_build_chains(tap))
    if not link.up:
        host.net.set_link_up(tap.name, up=True)


def diff(host: HostRoot, tap: Tap) -> tuple[str, ...]:
    link, uplink, drain = (find_link(host, name) for name in (tap.name, tap.uplink, _name_drain(tap)))
    if link is None:
        return (f"{tap.name} does not exist",)
    pairs = [
        (tap.name, "kind", link.kind, KIND), (tap.name, "address", link.mac, _address_of_host(tap.mac)),
        (tap.name, "state", "up" if link.up else "down", "up"), (tap.name, "bridge", link.master, _name_drain(tap)),
    ]  # fmt: skip
    if drain:
        pairs.append((drain.name, "state", "up" if drain.up else "down", "down"))
    if uplink:
        # fwd does not compare a frame with the MTU.
        pairs.append((tap.name, "MTU", str(link.mtu), str(uplink.mtu)))
        pairs.append((uplink.name, "promiscuous mode", "on" if uplink.promiscuous else "off", "on"))
    elif tap.uplink:
        pairs.append((tap.name, "uplink", None, tap.uplink))
    findings = [f"{name}: {what} is {now or 'none'}, expected {wanted}" for name, what, now, wanted in pairs if now != wanted]
    return (*findings, *diff_rules(host, tap, *_build_chains(tap)))


def find_uplink(host: HostRoot, link: Link) -> str:
    """As the rules name it."""
    for chain in host.net.read_table(name_table(link.name)) or ():
        for statement in chain.rules[-1] if chain.name == _FROM_GUEST and chain.rules else ():
            if "fwd" in statement:
                return str(statement["fwd"]["dev"])
    return ""


def _check_above(links: tuple[Link, ...], tap: Tap) -> None:
    if above := [f"{link.name} ({link.kind})" for link in links if link.parent == tap.uplink and link.kind in _ABOVE]:
        what = f"cannot create tap {tap.name} on {tap.uplink}: the uplink carries {', '.join(above)}"
        raise HostError(what, "stop the guests that use them, or use edge mode macvtap-vepa for this uplink", EBUSY)


def _build_chains(tap: Tap) -> tuple[Chain, Chain]:
    forward: list[Rule] = [*build_sender_rules(tap.mac), [{"counter": None}, {"fwd": {"dev": tap.uplink}}]]
    return (
        Chain(_FROM_GUEST, "ingress", tap.name, forward, policy="drop"),
        Chain(_TO_GUEST, "ingress", tap.uplink, _build_receiver_rules(tap)),
    )


def _build_receiver_rules(tap: Tap) -> list[Rule]:
    """A frame for another receiver is accepted: the rules of the next tap see it, and then the host's network stack."""
    mac, source, target = str(tap.mac), ether("saddr"), ether("daddr")
    return [
        [match(source, mac), {"accept": None}],  # its own frame, sent back by the switch
        [match(ether("type"), "8021q"), {"accept": None}],
        [match(ether("type"), "8021ad"), {"accept": None}],
        [match(target, mac), {"counter": None}, {"fwd": {"dev": tap.name}}],
        [match({"&": [target, "ff:ff:ff:ff:ff:f0"]}, "01:80:c2:00:00:00"), {"accept": None}],
        # libnftables-json(5) calls the device of `dup to` in the family netdev "addr".
        [match({"&": [target, "01:00:00:00:00:00"]}, "00:00:00:00:00:00", "!="), {"counter": None}, {"dup": {"addr": tap.name}}],
    ]


def _name_drain(tap: Tap) -> str:
    return f"nb{tap.name.removeprefix('nh')}"


def _address_of_host(mac: MacAddress) -> MacAddress:
    """Of the host's end of the tap: differs from the guest's, as libvirt has it. A host must not have the address of a guest."""
    return MacAddress.parse(f"fe{str(mac)[2:]}")
