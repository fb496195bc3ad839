"""Two guests of a software edge in network namespaces, frame by frame, and an external switch with hairpin.

nh-1 --+
       +-- UPLINK (namespace HOST) == veth == PORT (namespace SWITCH, bridge)
nh-2 --+
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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

PREFIX = f"mv{os.getpid()}"
HOST, SWITCH = f"{PREFIX}h", f"{PREFIX}s"
UPLINK, PORT = "uplink", "port"
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
Opener = Callable[[str, str, Path], netns.Tap]
"""Opens the guest's end of a tap: namespace, name, and an empty folder."""


@contextmanager
def build_network() -> Iterator[None]:
    for name in (HOST, SWITCH):
        create_netns(name)
    try:
        create_bridge("br0", SWITCH)
        ip("-n", HOST, "link", "add", UPLINK, "up", "type", "veth", "peer", "name", PORT, "netns", SWITCH)
        add_port("br0", PORT, SWITCH)
        set_hairpin(PORT, SWITCH, on=True)
        yield
    finally:
        for name in (HOST, SWITCH):
            delete_netns(name)


def find_differences(edge: SoftwareEdge, tap: Tap) -> tuple[str, ...]:
    return within(HOST, lambda: edge.diff(REAL, tap))


class Guests:
    """The two guests' ends of their taps, and what is seen around them."""

    def __init__(self, folder: Path, opener: Opener) -> None:
        self.ends = {}
        for tap in (ONE, TWO):
            (folder / tap.name).mkdir()
            self.ends[tap.name] = opener(HOST, tap.name, folder / tap.name)
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
        for end in (*self.ends.values(), self.port):
            end.close()

    def _count(self, ident: int) -> dict[str, int]:
        counts = {"out": self.port.count(ident, "in"), "back": self.port.count(ident, "out")}
        return counts | {"one": self.ends[ONE.name].count(ident), "two": self.ends[TWO.name].count(ident)}

    def _arrives(self, source: Tap, target: Tap) -> bool:
        ident = self.send(target.mac, source)
        return wait_until(lambda: bool(self.ends[target.name].count(ident)), timeout=0.2, interval=0.01)
