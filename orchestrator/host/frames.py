"""Counts ICMP echo frames on network interfaces with an AF_PACKET socket (packet(7)). Does not change frames or routes."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from orchestrator.errors import HostError
from orchestrator.host.netns import call_in_netns

_ETH_P_ALL, _ETH_P_IP = 3, 0x0800
_VLAN_TAGS = (0x8100, 0x88A8)
_ICMP_REQUEST, _ICMP_REPLY = 8, 0
# include/uapi/linux/if_packet.h and asm-generic/socket.h; the socket module of Python 3.11 lacks them.
_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _PACKET_STATISTICS, _PACKET_MR_PROMISC = 263, 1, 6, 1
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_PACKET_OUTGOING = 4
BUFFER_BYTES = 32 << 20
_SNAP = 256
# A frame that a bridge reflects, or that waits in a receive queue, arrives within a few milliseconds after its reply.
_SETTLE = 0.2


@dataclass(frozen=True)
class EchoFilter:
    """Selects ICMP echo frames over IPv4. None matches any address or size.

    Attributes:
        reply: count replies instead of requests.
        size: length of the ICMP data in bytes (`ping -s`); distinguishes counted pings from other pings between the addresses.
    """

    source: ipaddress.IPv4Address | None = None
    target: ipaddress.IPv4Address | None = None
    reply: bool = False
    size: int | None = None

    def matches(self, frame: bytes) -> bool:
        offset = 12
        while len(frame) >= offset + 2 and struct.unpack_from("!H", frame, offset)[0] in _VLAN_TAGS:
            offset += 4
        packet = frame[offset + 2 :]
        if len(packet) < 28 or frame[offset : offset + 2] != _ETH_P_IP.to_bytes(2, "big") or packet[0] >> 4 != 4:
            return False
        header, length, fragment = (packet[0] & 15) * 4, *struct.unpack_from("!H2xH", packet, 2)
        if packet[9] != socket.IPPROTO_ICMP or fragment & 0x1FFF or header < 20 or len(packet) < header + 8:
            return False
        for address, found in ((self.source, packet[12:16]), (self.target, packet[16:20])):
            if address is not None and address.packed != found:
                return False
        kind = _ICMP_REPLY if self.reply else _ICMP_REQUEST
        # The IP length, not the frame's: Ethernet pads short frames.
        return packet[header] == kind and self.size in (None, length - header - 8)


@dataclass(frozen=True)
class FrameCount:
    """Matching frames per interface. A count with dropped frames proves nothing."""

    incoming: dict[str, int]
    outgoing: dict[str, int]
    dropped: int  # frames, matching or not, that the kernel could not deliver


@dataclass
class FrameCounter:
    """Counts while the `with` block runs. Entering it raises HostError if the interface or namespace does not exist, or without
    CAP_NET_RAW.

    Args:
        interface: None for all interfaces of the network namespace, including interfaces that appear later.
        netns: name of a network namespace (`ip netns`), None for the current namespace.
        promiscuous: needs `interface`. Must not be set for a PF: the NIC would copy frames to the host that it normally does not.
    """

    wanted: EchoFilter
    interface: str | None = None
    netns: str | None = None
    promiscuous: bool = False
    _seen: Counter[tuple[str, bool]] = field(default_factory=Counter, init=False)
    _dropped: int = field(default=0, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)

    def __enter__(self) -> FrameCounter:
        self._socket = call_in_netns(self.netns, self._open)
        self._thread = threading.Thread(target=self._work, name="count-frames", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            time.sleep(_SETTLE)
        self._stop.set()
        self._thread.join()
        with self._socket:
            self._read_drops()

    def count(self) -> FrameCount:
        """Final after the end of the `with` block."""
        seen = self._seen.copy()
        incoming = {name: count for (name, outgoing), count in sorted(seen.items()) if not outgoing}
        return FrameCount(incoming, {name: count for (name, outgoing), count in sorted(seen.items()) if outgoing}, self._dropped)

    def _open(self) -> socket.socket:
        where = self.interface or "all interfaces"
        try:
            # One interface is selected by bind(2); until then, protocol 0 receives nothing. All interfaces need no bind(2).
            protocol = 0 if self.interface else socket.htons(_ETH_P_ALL)
            result = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise HostError("cannot open a packet socket", "run as root", error.errno or 0) from None
        try:
            result.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
            attach_filter(result, _program(self.wanted))
            if self.interface:
                result.bind((self.interface, _ETH_P_ALL))
            if self.promiscuous:
                request = struct.pack("iHH8s", socket.if_nametoindex(self.interface or ""), _PACKET_MR_PROMISC, 0, b"")
                result.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
            result.settimeout(0.05)
        except OSError as error:
            result.close()
            raise HostError(f"cannot count frames on {where}", "check the name with `ip link`", error.errno or 0) from None
        return result

    def _work(self) -> None:
        while True:
            try:
                frame, (name, _, kind, *_) = self._socket.recvfrom(_SNAP)
            except TimeoutError:
                if self._stop.is_set():
                    return
                continue
            except OSError:  # ENETDOWN: an interface went down; the socket stays usable (packet(7))
                if self._stop.is_set():
                    return
                continue
            if self.wanted.matches(frame):
                self._seen[name, kind == _PACKET_OUTGOING] += 1

    def _read_drops(self) -> None:
        # struct tpacket_stats: packets, drops; reading clears them.
        _, self._dropped = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))


def _program(wanted: EchoFilter) -> list[tuple[int, int, int, int]]:
    # Classic BPF (Documentation/networking/filter.rst) that accepts IPv4 ICMP between the two addresses, so that other frames do
    # not fill the buffer. The kernel removes VLAN tags before packet sockets.
    load_half, load_byte, load_word, equal, give = 0x28, 0x30, 0x20, 0x15, 0x06
    tests = [(load_half, 12, _ETH_P_IP), (load_byte, 23, socket.IPPROTO_ICMP)]
    tests += [(load_word, 26, int(wanted.source))] if wanted.source is not None else []
    tests += [(load_word, 30, int(wanted.target))] if wanted.target is not None else []
    program: list[tuple[int, int, int, int]] = []
    for index, (load, offset, value) in enumerate(tests):
        to_refusal = 2 * (len(tests) - index - 1) + 1
        program += [(load, 0, 0, offset), (equal, 0, to_refusal, value)]
    return [*program, (give, 0, 0, 0xFFFF), (give, 0, 0, 0)]


def attach_filter(target: socket.socket, program: Sequence[tuple[int, int, int, int]]) -> None:
    """``program``: classic BPF."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))
