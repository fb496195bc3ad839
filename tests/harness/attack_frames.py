"""Frames that a guest must not be able to send, or to send to everybody. Each ends with a number, by which it is found again."""

from __future__ import annotations

import struct
from ipaddress import IPv6Address

LOCAL, ARP, IPV6, VLAN, PROVIDER, OLD_PROVIDER, CONTROL = 0x88B5, 0x0806, 0x86DD, 0x8100, 0x88A8, 0x9100, 0x8808
ALL = "ff:ff:ff:ff:ff:ff"
ALL_NODES = "33:33:00:00:00:01"
"""IPv6 multicast (RFC 2464)."""

CONTROL_FRAMES = {
    "STP": ("01:80:c2:00:00:00", 38),
    "pause": ("01:80:c2:00:00:01", CONTROL),
    "LACP": ("01:80:c2:00:00:02", 0x8809),
    "802.1X": ("01:80:c2:00:00:03", 0x888E),
    "provider bridges": ("01:80:c2:00:00:08", 38),
    "MVRP": ("01:80:c2:00:00:0d", 0x88F5),
    "LLDP": ("01:80:c2:00:00:0e", 0x88CC),
    "LLDP, last": ("01:80:c2:00:00:0f", 0x88CC),
    "Cisco's CDP, VTP, DTP": ("01:00:0c:cc:cc:cc", 300),
    "Cisco's PVST": ("01:00:0c:cc:cc:cd", 50),
}
"""Target and EtherType, or length, of what switches tell each other."""
PAUSE = struct.pack("!HH", 1, 0xFFFF)
"""Payload of a pause frame with the longest time (IEEE 802.3 annex 31B)."""

_MAGIC = b"ATCK"


def finish(frame: bytes, number: int) -> bytes:
    """The frame with its number, as `guest_frames.pl` sends it."""
    return frame.ljust(72, b"\0") + end_of(number)


def end_of(number: int) -> bytes:
    return struct.pack("!4sI", _MAGIC, number)


def pack_mac(address: str) -> bytes:
    return bytes.fromhex(address.replace(":", ""))


def ether(target: str, source: str, kind: int = LOCAL, payload: bytes = b"") -> bytes:
    return pack_mac(target) + pack_mac(source) + struct.pack("!H", kind) + payload


def tagged(target: str, source: str, *tags: tuple[int, int], kind: int = LOCAL, payload: bytes = b"") -> bytes:
    """``tags``: EtherType and VLAN, outermost first."""
    words = b"".join(struct.pack("!HH", *tag) for tag in tags) + struct.pack("!H", kind)
    return pack_mac(target) + pack_mac(source) + words + payload


def arp_reply(sender: str, address: bytes, target: str, target_address: bytes) -> bytes:
    """The payload of a reply that says that the IPv4 ``address`` is at ``sender``."""
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + pack_mac(sender) + address + pack_mac(target) + target_address


def advertisement(sender: str, address: bytes) -> bytes:
    """The payload of a neighbour advertisement that says that the IPv6 ``address`` is at ``sender`` (RFC 4861).

    Without checksum, and without the last option, which `finish` appends: a bridge with br_netfilter cuts what follows.
    """
    icmp = struct.pack("!BBHI", 136, 0, 0, 0x2000_0000) + address + b"\x02\x01" + pack_mac(sender)
    head = struct.pack("!IHBB", 0x6000_0000, len(icmp) + 8, 58, 255)
    return head + address + bytes.fromhex("ff02" + "00" * 13 + "01") + icmp


def solicitation(sender: str, source: IPv6Address, target: IPv6Address) -> tuple[str, bytes]:
    """The multicast address, and the payload of a neighbour solicitation for the IPv6 ``target`` (RFC 4861). Without checksum."""
    icmp = struct.pack("!BBHI", 135, 0, 0, 0) + target.packed + b"\x01\x01" + pack_mac(sender)
    head = struct.pack("!IHBB", 0x6000_0000, len(icmp), 58, 255)
    group = bytes.fromhex("ff02" + "00" * 9 + "01ff") + target.packed[13:]
    return "33:33:" + group[12:].hex(":"), head + source.packed + group + icmp
