"""Measures from the host alone whether the switch port of an uplink has reflective relay (hairpin, IEEE 802.1Qbg).

Two locally administered addresses stand behind the uplink. The first frame, from A to B, teaches the switch where A is. The
second, from B to A, comes back only if the port sends frames out of the port that they came in on. Source and destination are
never equal: hardware drops such frames. The frames have an EtherType for local experiments (IEEE 802, 0x88b6).
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import time
from contextlib import suppress
from types import TracebackType

from orchestrator.errors import HostError
from orchestrator.host.frames import attach_filter
from orchestrator.model.uplink import HairpinResult

_ETHERTYPE = 0x88B6
# include/uapi/linux/if_packet.h; Python's socket module lacks them. An additional unicast address instead of promiscuous mode:
# the NIC delivers only the frames to it.
_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _PACKET_MR_UNICAST, _PACKET_OUTGOING = 263, 1, 3, 4
_PACKET_TYPE = 0xFFFF_F004  # of a frame, for BPF: SKF_AD_OFF + SKF_AD_PKTTYPE (include/uapi/linux/filter.h)
_ATTEMPTS = 5
_WAIT = 0.4  # seconds for a frame to come back
_MAGIC = b"nohype hairpin"
_Program = tuple[tuple[int, int, int, int], ...]


class HairpinProbe:
    """An open socket on an uplink, for repeated attempts: without netlink, in a few system calls each.

    Raises HostError if the uplink does not exist, is down or frames cannot be sent. It has to be opened again then. The socket
    follows its interface, also if that is renamed.
    """

    def __init__(self, uplink: str) -> None:
        self._uplink = uplink
        self._first, self._second = _choose_addresses(uplink)
        self._nonce = os.urandom(8)  # the same for all attempts: a frame that comes back late counts too
        self._socket = _open(uplink, (self._first, self._second), _select(self._first, self._nonce))

    def __enter__(self) -> HairpinProbe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def attempt(self, wait: float) -> bool:
        """Whether a frame comes back within ``wait`` seconds, also one of an earlier attempt."""
        _send(self._socket, self._uplink, self._second, self._first, b"teach" + self._nonce)
        _send(self._socket, self._uplink, self._first, self._second, self._nonce)
        return _await(self._socket, self._first, self._nonce, time.monotonic() + wait)

    def discard(self) -> None:
        """Takes frames that came back late: the next attempt counts only its own."""
        self._socket.settimeout(0)
        with suppress(OSError):  # BlockingIOError: there are none left
            while True:
                self._socket.recv(256)

    def close(self) -> None:
        self._socket.close()


def probe_hairpin(uplink: str, *, attempts: int = _ATTEMPTS, wait: float = _WAIT) -> HairpinResult:
    """Ends with the first frame that comes back. It leaves two addresses in the switch's table, the same two each time.

    Raises HostError if the uplink does not exist, is down or frames cannot be sent.
    """
    with HairpinProbe(uplink) as probe:
        for number in range(1, attempts + 1):
            if probe.attempt(wait):
                return HairpinResult(uplink, number, 1)
    return HairpinResult(uplink, attempts, 0)


def _choose_addresses(uplink: str) -> tuple[bytes, bytes]:
    # Of the uplink's own address, so that two hosts behind one switch never use the same. 06 is locally administered, unicast.
    digest = hashlib.sha256(_read_address(uplink)).digest()
    return tuple(b"\x06NH" + digest[:2] + bytes([number]) for number in (1, 2))  # type: ignore[return-value]


def _read_address(uplink: str) -> bytes:
    with _open(uplink, ()) as probe:
        return bytes(probe.getsockname()[4])


def _select(target: bytes, nonce: bytes) -> _Program:
    """Classic BPF that accepts the frames that return. Others, such as those of a guest with the same EtherType, would fill the
    buffer.
    """
    load_word, load_half, load_byte, equal, give = 0x20, 0x28, 0x30, 0x15, 0x06
    start = 14 + len(_MAGIC)
    tests = [
        (load_word, 0, int.from_bytes(target[:4], "big")),
        (load_half, 4, int.from_bytes(target[4:], "big")),
        (load_word, start, int.from_bytes(nonce[:4], "big")),
        (load_word, start + 4, int.from_bytes(nonce[4:], "big")),
    ]
    program = [(load_byte, 0, 0, _PACKET_TYPE), (equal, 2 * len(tests) + 1, 0, _PACKET_OUTGOING)]
    for index, (load, offset, value) in enumerate(tests):
        program += [(load, 0, 0, offset), (equal, 0, 2 * (len(tests) - index) - 1, value)]
    return (*program, (give, 0, 0, 0xFFFF), (give, 0, 0, 0))


def _open(uplink: str, addresses: tuple[bytes, ...], program: _Program = ()) -> socket.socket:
    what = f"cannot probe the switch port of {uplink}"
    try:
        # Protocol 0 until bind(2): otherwise it first receives frames of all interfaces.
        result = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    except OSError as error:
        raise HostError(what, "run as root", error.errno or 0) from None
    try:
        if program:
            attach_filter(result, program)
        result.bind((uplink, _ETHERTYPE))
        for address in addresses:
            request = struct.pack("iHH8s", socket.if_nametoindex(uplink), _PACKET_MR_UNICAST, len(address), address)
            result.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
    except OSError as error:
        result.close()
        raise HostError(what, "check the name with `ip link`, and that the interface is up", error.errno or 0) from None
    return result


def _send(probe: socket.socket, uplink: str, target: bytes, source: bytes, data: bytes) -> None:
    frame = target + source + struct.pack("!H", _ETHERTYPE) + (_MAGIC + data).ljust(46, b"\0")
    try:
        probe.settimeout(_WAIT)
        probe.send(frame)
    except OSError as error:
        raise HostError(f"cannot send a probe frame on {uplink}", "set the interface up", error.errno or 0) from None


def _await(probe: socket.socket, target: bytes, nonce: bytes, deadline: float) -> bool:
    while (left := deadline - time.monotonic()) > 0:
        probe.settimeout(left)
        try:
            frame, (_, _, kind, *_) = probe.recvfrom(256)
        except TimeoutError:
            return False
        except OSError:  # ENETDOWN once, if the interface goes down
            continue
        if kind != _PACKET_OUTGOING and frame[:6] == target and frame[14:].startswith(_MAGIC + nonce):
            return True
    return False
