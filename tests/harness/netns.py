"""Runs a function in another network namespace, with frames put into and taken out of its interfaces."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")
_CLONE_NEWNET = 0x4000_0000
ETHERTYPE = 0x88B5
"""For local experiments (IEEE 802)."""
MAGIC = b"EDGE"
_SOL_PACKET, _PACKET_AUXDATA, _VLAN_VALID, _PROTOCOL_VALID = 263, 8, 0x10, 0x40  # include/uapi/linux/if_packet.h
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x0002 | 0x1000  # include/uapi/linux/if_tun.h: IFF_TAP | IFF_NO_PI


def within(netns: str, call: Callable[[], _Result]) -> _Result:
    """In a thread that enters the namespace, so that sockets, programs and /proc/sys/net are those of it."""
    outcome: list[_Result | BaseException] = []

    def work() -> None:
        try:
            with open(f"/run/netns/{netns}", "rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), netns)
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def build_frame(target: str, source: str, ident: int, *, tag: int = 0) -> bytes:
    """``tag``: the EtherType of a VLAN tag, for VLAN 7; 0 for none."""
    tags = struct.pack("!HH", tag, 7) if tag else b""
    head = bytes.fromhex((target + source).replace(":", "")) + tags + struct.pack("!H", ETHERTYPE)
    return head + (MAGIC + struct.pack("!I", ident)).ljust(46, b"\0")


def has_ident(frame: bytes, ident: int) -> bool:
    return MAGIC + struct.pack("!I", ident) in frame[:40]


def _with_tag(data: bytes, extra: list[tuple[int, int, bytes]]) -> bytes:
    """The kernel takes the outer VLAN tag out of a frame (skb_vlan_untag()) and reports it apart (packet(7), tpacket_auxdata)."""
    for level, kind, words in extra:
        if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
            status, _, _, _, _, vlan, protocol = struct.unpack_from("=IIIHHHH", words)
            if status & _VLAN_VALID:
                return data[:12] + struct.pack("!HH", protocol if status & _PROTOCOL_VALID else 0x8100, vlan) + data[12:]
    return data


class Watch:
    """Sees the frames of an interface in both directions, as tcpdump does."""

    def __init__(self, netns: str, interface: str, *, buffer: int = 0) -> None:
        """``buffer``: bytes; 0 for the kernel's default, which loses frames of a flood."""

        def listen() -> socket.socket:
            result = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            result.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            if buffer:
                result.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
            result.bind((interface, 3))  # ETH_P_ALL
            return result

        self._socket = within(netns, listen)
        self._socket.setblocking(False)
        self._frames: list[tuple[str, bytes]] = []

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def count(self, ident: int, way: str) -> int:
        """``way`` is "in" or "out"."""
        self._receive()
        return sum(has_ident(data, ident) for direction, data in self._frames if direction == way)

    def count_all(self, way: str) -> int:
        """Of all frames."""
        self._receive()
        return sum(direction == way for direction, _ in self._frames)

    def _receive(self) -> None:
        self._frames += self.take()

    def take(self) -> list[tuple[str, bytes]]:
        """The frames since the last call, each with "in" or "out"."""
        taken: list[tuple[str, bytes]] = []
        while True:
            try:
                data, extra, _, address = self._socket.recvmsg(2048, 64)
            except BlockingIOError:
                return taken
            taken.append(("out" if address[2] == 4 else "in", _with_tag(data, extra)))

    def close(self) -> None:
        self._socket.close()


def open_tun(netns: str, name: str) -> Tap:
    """An existing tap of the driver tun, as QEMU does."""

    def attach() -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
        return descriptor

    return Tap(within(netns, attach))


def open_macvtap(netns: str, name: str, folder: Path) -> Tap:
    """As QEMU does, by its character device. Needs a private mount of sysfs, which shows the interfaces of its own namespace."""
    script = f"mount -t sysfs sysfs {folder} && cat {folder}/class/net/{name}/tap*/dev"
    argv = ["ip", "netns", "exec", netns, "unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    major, minor = map(int, subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split(":"))
    node = folder.parent / f"{name}.dev"
    os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(major, minor))
    descriptor = os.open(node, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"", _TAP_WITHOUT_HEADER))
    return Tap(descriptor)


class Tap:
    """The guest's end of a tap, as QEMU has it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._frames: list[bytes] = []

    def send(self, frame: bytes) -> None:
        os.write(self._descriptor, frame)

    def count(self, ident: int) -> int:
        """How often the frame with this number was received."""
        self._frames += self.take()
        return sum(has_ident(frame, ident) for frame in self._frames)

    def take(self) -> list[bytes]:
        """The frames since the last call."""
        taken: list[bytes] = []
        while True:
            try:
                taken.append(os.read(self._descriptor, 4096))
            except BlockingIOError:
                return taken

    def close(self) -> None:
        os.close(self._descriptor)
