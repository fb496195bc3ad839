"""What a guest of a software edge can do to others, on a real kernel: two guests on one uplink, and a station behind the switch.

attacker [tap] --+
                 +-- UPLINK (namespace HOST) == veth == PORT (namespace SWITCH, bridge br0) SOCKET == veth == STATION
victim   [tap] --+

docs/threat-model.md lists each attack with what stops it. A frame that is not stopped at the tap enters the switch at PORT.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.host.edge import SOFTWARE
from orchestrator.host.edge.base import SoftwareEdge
from orchestrator.host.netlink import add_port
from orchestrator.waiting import wait_until
from tests.harness.attack_frames import (
    ALL,
    ARP,
    CONTROL,
    CONTROL_FRAMES,
    IPV6,
    LOCAL,
    OLD_PROVIDER,
    PAUSE,
    PROVIDER,
    VLAN,
    advertisement,
    arp_reply,
    end_of,
    ether,
    finish,
    tagged,
)
from tests.harness.edge_network import BRIDGE, HOST, MAC1, MAC2, ONE, PORT, SWITCH, TWO, UPLINK, plug
from tests.harness.netns import Watch, ip

pytestmark = pytest.mark.netns

STATION, SOCKET = "station", "socket"
ME, THEM, OUTSIDE, OF_UPLINK = str(MAC1), str(MAC2), "02:00:00:00:00:50", "02:00:00:00:00:60"
VICTIMS_ADDRESS, STATIONS_ADDRESS = bytes([10, 0, 0, 2]), bytes([10, 0, 0, 50])


class World:
    """What everybody sends and receives. Each frame ends with a number, by which it is found wherever it went."""

    def __init__(self, attacker: object, victim: object) -> None:
        self._taps = {"attacker": attacker, "victim": victim}
        self._watches = {
            "port": Watch(SWITCH, PORT), "station": Watch(SWITCH, STATION), "uplink": Watch(HOST, UPLINK)
        }  # fmt: skip
        self._seen: Counter[tuple[str, bytes]] = Counter()
        self._number = 0
        for sender, target in (("attacker", THEM), ("victim", OUTSIDE), ("uplink", OUTSIDE), ("station", THEM), ("station", ME)):
            # The carrier of a new interface comes late, and the switch floods frames to addresses that it has not learned.
            assert self.arrives(sender, target), f"{sender} does not reach {target}"

    def send(self, sender: str, frame: bytes) -> bytes:
        """Returns the end of the frame."""
        self._number += 1
        end_to_end = self._taps.get(sender) or self._watches[sender]
        end_to_end.send(finish(frame, self._number))  # type: ignore[attr-defined]
        return end_of(self._number)

    def count(self, end: bytes) -> dict[str, int]:
        """How often the frame entered and left the switch at the port, and who received it."""
        self.look()
        places = {"out": "port in", "back": "port out", "host": "uplink in", "station": "station in"}
        found = {name: self._seen[place, end] for name, place in places.items()}
        found |= {name: self._seen[name, end] for name in self._taps}
        return {name: number for name, number in found.items() if number}

    def look(self) -> None:
        for name, watch in self._watches.items():
            self._seen.update((f"{name} {way}", frame[-8:]) for way, frame in watch.take())
        for name, tap in self._taps.items():
            self._seen.update((name, frame[-8:]) for frame in tap.take())  # type: ignore[attr-defined]

    def trace(self, frame: bytes, sender: str = "attacker") -> dict[str, int]:
        """Where the frame went in the end: a later frame of the same sender has made the whole way."""
        end = self.send(sender, frame)
        target = OUTSIDE if sender != "station" else ALL
        source = {"attacker": ME, "victim": THEM, "station": OUTSIDE}[sender]
        later = self.send(sender, ether(target, source))
        last = ("station",) if sender != "station" else ("attacker", "victim")
        assert wait_until(lambda: all(who in self.count(later) for who in last), timeout=30, interval=0.002)
        # What returns to the host takes a way of its own.
        marker = self.send("station", ether(ALL, OUTSIDE))
        assert wait_until(lambda: {"attacker", "victim"} <= self.count(marker).keys(), timeout=30, interval=0.002)
        return self.count(end)

    def arrives(self, sender: str, target: str, timeout: float = 30) -> bool:
        """Whether one of the frames arrives that are sent until then."""
        source = {"attacker": ME, "victim": THEM, "uplink": OF_UPLINK, "station": OUTSIDE}[sender]
        receivers = {ME: {"attacker"}, THEM: {"victim"}, OUTSIDE: {"station"}, ALL: {"attacker", "victim"}}[target]

        def try_once() -> bool:
            end = self.send(sender, ether(target, source))
            return wait_until(lambda: receivers <= self.count(end).keys(), timeout=0.2, interval=0.002)

        return wait_until(try_once, timeout=timeout, interval=0)

    @contextmanager
    def flood(self, frame: bytes) -> Iterator[None]:
        """The attacker sends the frame as fast as it can; at least 2,000 of them are sent before and after the block ends."""
        stop, sent = threading.Event(), 0

        def work() -> None:
            nonlocal sent
            while not stop.is_set():
                try:
                    self._taps["attacker"].send(frame)  # type: ignore[attr-defined]
                    sent += 1
                except BlockingIOError:
                    pass

        def goes_on(number: int) -> bool:
            self.look()  # the kernel lets the attacker send no more once too many of its frames wait for their receiver
            return sent >= number

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            assert wait_until(lambda: goes_on(2000), timeout=60, interval=0.001)
            before = sent
            yield
            assert wait_until(lambda: goes_on(before + 2000), timeout=60, interval=0.001)
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        for end in (*self._taps.values(), *self._watches.values()):
            end.close()  # type: ignore[attr-defined]


@pytest.fixture(params=list(SOFTWARE.values()), ids=list(SOFTWARE))
def edge(request: pytest.FixtureRequest) -> SoftwareEdge:
    found: SoftwareEdge = request.param
    return found


@pytest.fixture
def world(edge: SoftwareEdge, network: None, tmp_path: Path) -> Iterator[World]:
    ip("-n", HOST, "link", "set", UPLINK, "address", OF_UPLINK)
    ip("-n", HOST, "link", "set", UPLINK, "promisc", "on")  # an edge may need it, and must be as strict with it
    ip("-n", SWITCH, "link", "add", STATION, "address", OUTSIDE, "up", "type", "veth", "peer", "name", SOCKET)
    add_port(BRIDGE, SOCKET, SWITCH)
    attacker, victim = (plug(edge, tap, tmp_path) for tap in (ONE, TWO))
    found = World(attacker, victim)
    yield found
    found.close()


def test_frame_between_guests_makes_its_way_through_the_switch(world: World) -> None:
    """Without this, the tests below would show nothing."""
    assert world.trace(ether(THEM, ME)) == {"out": 1, "back": 1, "host": 1, "victim": 1}
    assert world.trace(ether(OUTSIDE, ME)) == {"out": 1, "station": 1}


SOURCES = {
    "the victim's": THEM,
    "a station's": OUTSIDE,
    "the uplink's": OF_UPLINK,
    "another of this prefix": "02:4e:48:00:00:66",
    "a group": "03:4e:48:00:00:01",
    "broadcast": ALL,
    "none": "00:00:00:00:00:00",
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_forged_sender_is_dropped_at_the_tap(world: World, source: str) -> None:
    for target in (THEM, OUTSIDE, ALL, "33:33:00:00:00:01", OF_UPLINK):
        assert world.trace(ether(target, source)) == {}
    assert world.arrives("station", THEM), "the switch still knows where the victim is"


def test_flood_of_forged_senders_does_not_fill_the_table_of_the_switch(world: World) -> None:
    ends = [world.send("attacker", ether(OUTSIDE, f"06:00:00:00:{n >> 8:02x}:{n & 255:02x}")) for n in range(2000)]
    assert world.trace(ether(OUTSIDE, ME)) == {"out": 1, "station": 1}
    assert [world.count(end) for end in ends if world.count(end)] == []


TAGS = {
    "VLAN": ((VLAN, 7),),
    "priority tag": ((VLAN, 0),),
    "all bits": ((VLAN, 0xFFFF),),
    "service tag": ((PROVIDER, 7),),
    "double tag": ((VLAN, 1), (VLAN, 7)),
    "service tag outside": ((PROVIDER, 1), (VLAN, 7)),
    "service tag inside": ((VLAN, 1), (PROVIDER, 7)),
    "service tag of before 802.1ad": ((OLD_PROVIDER, 7),),
    "the same outside": ((OLD_PROVIDER, 1), (VLAN, 7)),
}


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
def test_tagged_frame_is_dropped_at_the_tap(world: World, tags: tuple[tuple[int, int], ...]) -> None:
    for target in (THEM, OUTSIDE, ALL):
        assert world.trace(tagged(target, ME, *tags)) == {}


TO_SWITCHES = {**CONTROL_FRAMES, "pause to a station": (OUTSIDE, CONTROL)}


@pytest.mark.parametrize(("target", "kind"), TO_SWITCHES.values(), ids=TO_SWITCHES)
def test_control_frame_of_switches_is_dropped_at_the_tap(world: World, target: str, kind: int) -> None:
    assert world.trace(ether(target, ME, kind, PAUSE)) == {}


POISON = {
    "ARP, with the attacker's address": (ARP, arp_reply(ME, VICTIMS_ADDRESS, OUTSIDE, STATIONS_ADDRESS)),
    "ARP, with another address": (ARP, arp_reply(OUTSIDE, VICTIMS_ADDRESS, OUTSIDE, STATIONS_ADDRESS)),
    "neighbour advertisement": (IPV6, advertisement(ME, bytes.fromhex("fd00" + "00" * 13 + "02"))),
}


@pytest.mark.parametrize(("kind", "payload"), POISON.values(), ids=POISON)
def test_forged_neighbour_is_stopped_by_the_switch_only(world: World, kind: int, payload: bytes) -> None:
    """The edge does not know the IP addresses of guests. Each such frame passes the switch, which can drop it."""
    frame = ether(THEM, ME, kind, payload)
    assert world.trace(frame) == {"out": 1, "back": 1, "host": 1, "victim": 1}
    rule = "arp saddr ip 10.0.0.2" if kind == ARP else "icmpv6 type nd-neighbor-advert"
    chain = f'add table netdev inspect; add chain netdev inspect in {{ type filter hook ingress device "{PORT}" priority 0; }}'
    ip("netns", "exec", SWITCH, "nft", f"{chain}; add rule netdev inspect in {rule} drop")
    assert world.trace(frame) == {"out": 1}


def test_guest_does_not_see_frames_for_its_neighbour(world: World) -> None:
    """Whatever the guest does: what its NIC is set to is not known to the host's side."""
    assert world.trace(ether(THEM, OUTSIDE), "station") == {"back": 1, "host": 1, "victim": 1}
    assert world.trace(ether(OUTSIDE, THEM), "victim") == {"out": 1, "station": 1}


def test_frame_to_the_uplink_reaches_the_host_by_way_of_the_switch(world: World) -> None:
    assert world.trace(ether(OF_UPLINK, ME)) == {"out": 1, "back": 1, "host": 1}


FLOODS = {
    "broadcast": ether(ALL, ME),
    "multicast": ether("33:33:00:00:00:01", ME),
    "unicast to the neighbour": ether(THEM, ME),
    "unicast to a station": ether(OUTSIDE, ME),
    "long frames": ether(OUTSIDE, ME, LOCAL, bytes(1400)),
    "forged senders": ether(THEM, OUTSIDE),
}


@pytest.mark.parametrize("frame", FLOODS.values(), ids=FLOODS)
def test_flood_delays_the_neighbour_but_does_not_stop_it(world: World, frame: bytes) -> None:
    """Frames are lost meanwhile: those that are sent again arrive."""
    with world.flood(frame.ljust(80, b"\0")):
        for _ in range(10):
            assert world.arrives("victim", OUTSIDE)
            assert world.arrives("station", THEM)
    for sender, target in (("victim", OUTSIDE), ("station", THEM), ("station", ME), ("station", ALL)):
        assert world.arrives(sender, target)
    assert world.trace(ether(OUTSIDE, THEM), "victim") == {"out": 1, "station": 1}
