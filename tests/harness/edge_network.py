"""Two guests of a software edge in network namespaces, frame by frame, and an external switch with hairpin.

nh-1 --+
       +-- UPLINK (namespace HOST) == veth == PORT (namespace SWITCH, bridge)
nh-2 --+
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.host import netlink
from orchestrator.host.edge import SoftwareEdge, Tap
from orchestrator.host.netlink import add_port, create_bridge, create_netns, delete_netns, set_hairpin
from orchestrator.host.root import HostRoot
from orchestrator.values import MacAddress
from orchestrator.waiting import wait_until
from tests.harness import netns
from tests.harness.netns import Watch, build_frame, ip, within

HOST, SWITCH = (f"ed{os.getpid()}{end}" for end in ("h", "s"))
UPLINK, PORT, BRIDGE = "uplink", "port", "br0"
REAL = HostRoot(Path("/"), netlink)
MAC1, MAC2 = (MacAddress.parse(f"02:4e:48:00:00:0{number}") for number in (1, 2))
ONE, TWO = Tap("nh-1", MAC1, UPLINK), Tap("nh-2", MAC2, UPLINK)
ALL = "ff:ff:ff:ff:ff:ff"
GROUP = "33:33:ff:00:00:02"
THERE = {"out": 1, "back": 1, "two": 1}
FORBIDDEN = {
    "spoofed": {"target": MAC2, "source": str(MAC2)},
    "spoofed broadcast": {"target": ALL, "source": "02:00:00:00:00:77"},
    "STP": {"target": "01:80:c2:00:00:00"},
    "LLDP": {"target": "01:80:c2:00:00:0e"},
    "VLAN": {"target": MAC2, "tag": 0x8100},
    "QinQ": {"target": MAC2, "tag": 0x88A8},
}


@contextmanager
def build_network(host: str = HOST, switch: str = SWITCH, *, silent: bool = False) -> Iterator[None]:
    """``silent``: the kernel sends nothing of its own, no neighbour discovery."""
    try:
        for name in (host, switch):
            create_netns(name)
            if silent:
                within(name, _disable_ipv6)
        create_bridge(BRIDGE, switch)
        ip("-n", host, "link", "add", UPLINK, "up", "type", "veth", "peer", "name", PORT, "netns", switch)
        add_port(BRIDGE, PORT, switch)
        set_hairpin(PORT, switch, on=True)
        yield
    finally:
        for name in (host, switch):
            if netlink.netns_exists(name):
                delete_netns(name)


def _disable_ipv6() -> None:
    """Also of interfaces that are made later."""
    for which in ("all", "default"):
        if (file := Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6")).exists():
            file.write_text("1")


def plug(edge: SoftwareEdge, tap: Tap, folder: Path, host: str = HOST) -> netns.Tap:
    """Makes the tap as the manager does, and opens it as QEMU does."""
    within(host, lambda: edge.create(REAL, tap))
    return open_end(edge.KIND, tap.name, folder, host)


def open_end(kind: str, tap: str, folder: Path, host: str = HOST) -> netns.Tap:
    """Opens an existing tap. ``kind``: its driver, macvtap or tun; ``folder``: for files with the name of the tap."""
    if kind != "macvtap":
        return netns.open_tun(host, tap)
    (mount := folder / tap).mkdir()
    return netns.open_macvtap(host, tap, mount)


def find_differences(edge: SoftwareEdge, tap: Tap) -> tuple[str, ...]:
    return within(HOST, lambda: edge.diff(REAL, tap))


class Guests:
    """The two guests' ends of their taps, and what is seen around them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.ends = {tap.name: open_end(kind, tap.name, folder) for tap in (ONE, TWO)}
        self.port = Watch(SWITCH, PORT)
        self._ident = 0
        # The carrier of a new interface may come later, and the switch has to learn both addresses: it floods a frame to an
        # address that it has not learned.
        for source, target in ((ONE, TWO), (TWO, ONE)):
            assert wait_until(lambda s=source, t=target: self._arrives(s, t), timeout=20, interval=0.02)  # type: ignore[misc]

    def send(self, target: MacAddress | str, sender: Tap = ONE, source: str = "", tag: int = 0, size: int = 60) -> int:
        self._ident += 1
        frame = build_frame(str(target), source or str(sender.mac), self._ident, tag=tag)
        self.ends[sender.name].send(frame.ljust(size, b"\0"))
        return self._ident

    def send_from_outside(self, target: MacAddress | str, source: str = "02:00:00:00:00:50", tag: int = 0) -> int:
        self._ident += 1
        self.port.send(build_frame(str(target), source, self._ident, tag=tag))
        return self._ident

    def trace(self, ident: int, **expected: int) -> dict[str, int]:
        """How often the frame left the host, came back, and was received by each guest: as expected, or what it is in the end."""
        wanted = {"out": 0, "back": 0, "one": 0, "two": 0} | expected
        wait_until(lambda: all(now >= wanted[key] for key, now in self._count(ident).items()), timeout=5, interval=0.002)
        # Frames that are queued at this time are received before this one.
        marker = self.send_from_outside(ALL)
        assert wait_until(lambda: all(end.count(marker) for end in self.ends.values()), timeout=20, interval=0.002)
        return {key: now for key, now in self._count(ident).items() if now}

    def close(self) -> None:
        for end in self.ends.values():
            end.close()
        self.port.close()

    def _count(self, ident: int) -> dict[str, int]:
        counts = {"out": self.port.count(ident, "in"), "back": self.port.count(ident, "out")}
        return counts | {"one": self.ends[ONE.name].count(ident), "two": self.ends[TWO.name].count(ident)}

    def _arrives(self, source: Tap, target: Tap) -> bool:
        ident = self.send(target.mac, source)
        return wait_until(lambda: bool(self.ends[target.name].count(ident)), timeout=0.2, interval=0.01)
