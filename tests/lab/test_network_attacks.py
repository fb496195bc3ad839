"""What a guest with a VF can do to others: each frame is followed to the switch port and to the guests that receive it.

net-b attacks from a NIC of the network blue, net-c from one that is in no network. The NIC is QEMU's 82576, with the kernel's
igb in the host and igbvf in the guests. docs/threat-model.md lists each attack with what stops it.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from tests.harness.attack_frames import (
    ALL,
    ALL_NODES,
    ARP,
    CONTROL,
    CONTROL_FRAMES,
    IPV6,
    OLD_PROVIDER,
    PAUSE,
    PROVIDER,
    VLAN,
    advertisement,
    arp_reply,
    ether,
    pack_mac,
    tagged,
)
from tests.harness.guest_frames import OUT_AND_BACK, OUTSIDE, Nic, Wire
from tests.lab.conftest import LabHost
from tests.lab.members import BLUE, RED, created, watched

pytestmark = pytest.mark.soak

GROUP = "33:33:00:00:99:99"
"""Nobody has joined it."""


@pytest.fixture(scope="module")
def wire(host: LabHost) -> Iterator[Wire]:
    with created(host) as guests, watched(host, guests) as found:
        yield found


@pytest.fixture
def victim(wire: Wire) -> Nic:
    return wire.find("net-a", BLUE)


@pytest.fixture
def attacker(wire: Wire) -> Nic:
    return wire.find("net-b", BLUE)


@pytest.fixture
def other(wire: Wire) -> Nic:
    """In the other network."""
    return wire.find("net-c", RED)


@pytest.fixture
def loose(wire: Wire) -> Nic:
    """In no network."""
    return wire.find("net-c", 0)


def test_frame_of_an_honest_guest_takes_its_way(wire: Wire, attacker: Nic, victim: Nic, loose: Nic) -> None:
    """Without this, the tests below would show nothing."""
    frames = {"unicast": ether(victim.mac, attacker.mac), "broadcast": ether(ALL, attacker.mac)}
    assert wire.trace(attacker, frames) == {
        "unicast": OUT_AND_BACK + victim.place,
        "broadcast": OUT_AND_BACK + wire.places(BLUE),  # the 82576 returns it to the sender too
    }
    assert wire.trace(loose, {"": ether(ALL, loose.mac)}) == {"": OUT_AND_BACK + wire.places(0)}


def test_forged_sender_is_not_dropped_by_the_emulated_nic_and_stays_in_the_network(
    host: LabHost, wire: Wire, attacker: Nic, victim: Nic, other: Nic
) -> None:
    """A real NIC drops it: the PF has the spoof check on."""
    shown = host.run("ip link show nic0").stdout
    assert re.search(rf"{attacker.mac}.*spoof checking on", shown), shown
    sources = {"victim": victim.mac, "other": other.mac, "station": OUTSIDE, "new": "06:4e:48:00:00:66"}
    for name, source in sources.items():
        found = wire.trace(attacker, {target: ether(target, source) for target in (victim.mac, other.mac, ALL)})
        assert found == {
            victim.mac: OUT_AND_BACK + victim.place,
            other.mac: OUT_AND_BACK,
            ALL: OUT_AND_BACK + wire.places(BLUE),
        }, name


TAGS = {
    "VLAN of the other network": ((VLAN, RED),),
    "priority tag": ((VLAN, 0),),
    "service tag": ((PROVIDER, RED),),
    "service tag of before 802.1ad": ((OLD_PROVIDER, RED),),
    "double tag": ((VLAN, BLUE), (VLAN, RED)),
    "double tag of the other network": ((VLAN, RED), (VLAN, RED)),
}


def test_tagged_frame_of_a_network_stays_in_it(wire: Wire, attacker: Nic, other: Nic) -> None:
    """The PF puts the tag of the network in front of it."""
    assert wire.trace(attacker, {name: tagged(other.mac, attacker.mac, *tags) for name, tags in TAGS.items()}) == dict.fromkeys(
        TAGS, OUT_AND_BACK
    )
    found = wire.trace(attacker, {name: tagged(ALL, attacker.mac, *tags) for name, tags in TAGS.items()})
    assert found == dict.fromkeys(TAGS, OUT_AND_BACK + wire.places(BLUE))


def test_tagged_frame_of_a_guest_in_no_network_reaches_that_network(wire: Wire, loose: Nic, victim: Nic, other: Nic) -> None:
    """Nothing stops it. So the manager refuses tenants' NICs outside networks on such an uplink."""
    frames = {nic.mac: tagged(nic.mac, loose.mac, (VLAN, nic.vlan)) for nic in (victim, other)}
    assert wire.trace(loose, frames) == {nic.mac: OUT_AND_BACK + nic.place for nic in (victim, other)}


def test_control_frames_leave_the_host_and_reach_no_other_network(wire: Wire, attacker: Nic, victim: Nic) -> None:
    """The port of the switch must drop them (docs/switches.md). As a bridge without STP, the lab's switch forwards some."""
    frames = {name: ether(target, attacker.mac, kind, PAUSE) for name, (target, kind) in CONTROL_FRAMES.items()}
    found = wire.trace(attacker, {**frames, "pause to a station": ether(victim.mac, attacker.mac, CONTROL, PAUSE)})
    blue = wire.places(BLUE)
    for name, trace in found.items():
        assert trace["out"] == 1, name
        assert {place for place in trace} <= {"out", "back", *blue}, (name, trace)


def test_forged_neighbours_reach_the_network(wire: Wire, attacker: Nic, victim: Nic) -> None:
    """The host does not know the addresses of guests. Each such frame passes the switch, which can inspect it."""
    address, mine = bytes([10, 1, 0, 1]), bytes([10, 1, 0, 5])
    frames = {
        "ARP": ether(ALL, attacker.mac, ARP, arp_reply(attacker.mac, address, ALL, address)),
        "ARP to the victim": ether(victim.mac, attacker.mac, ARP, arp_reply(attacker.mac, mine, victim.mac, address)),
        "NDP": ether(ALL_NODES, attacker.mac, IPV6, advertisement(attacker.mac, bytes.fromhex("fd00" + "00" * 13 + "01"))),
    }
    found = wire.trace(attacker, frames)
    assert found["ARP"] == OUT_AND_BACK + wire.places(BLUE)
    assert found["ARP to the victim"] == OUT_AND_BACK + victim.place
    assert found["NDP"]["out"] == found["NDP"]["back"] == 1
    assert {*found["NDP"]} <= {"out", "back", *wire.places(BLUE)}


def listen(wire: Wire, victim: Nic) -> Mapping[str, Counter[str]]:
    """Who receives what comes from the switch for others."""
    return wire.send_from_outside(
        {
            "to the victim": tagged(victim.mac, OUTSIDE, (VLAN, BLUE)),
            "group": tagged(GROUP, OUTSIDE, (VLAN, BLUE)),
            "group of the other network": tagged(GROUP, OUTSIDE, (VLAN, RED)),
            "broadcast": tagged(ALL, OUTSIDE, (VLAN, BLUE)),
        }
    )


def request(wire: Wire, nic: Nic, *words: int) -> bool:
    """Sends a request to the PF by the VF's mailbox; returns whether the PF did it."""
    answer = wire.command(nic.guest, f"mailbox {nic.mac} {' '.join(map(hex, words))}")
    code = int(answer.removeprefix("answer="), 16)
    assert code >> 30 in (1, 2), answer
    return code >> 30 == 2  # E1000_VT_MSGTYPE_ACK


def test_promiscuous_guest_sees_no_frame_for_its_neighbour(wire: Wire, attacker: Nic, victim: Nic) -> None:
    """By its mailbox it may get all multicast of its own network (the emulated NIC ignores it), and no more."""
    assert "status=0" in wire.tell(attacker.guest, f"shell ifconfig {attacker.name} promisc")
    flags = wire.tell(attacker.guest, f"shell cat /sys/class/net/{attacker.name}/flags").split()[-1]
    assert int(flags, 16) & 0x100  # IFF_PROMISC
    assert listen(wire, victim)["to the victim"] == victim.place
    assert not request(wire, attacker, 0x06 | 1 << 16)
    assert request(wire, attacker, 0x06 | 2 << 16)
    found = listen(wire, victim)
    assert found["to the victim"] == victim.place
    assert found["group"] <= wire.places(BLUE)
    assert not found["group of the other network"] & wire.places(BLUE)


def test_guest_cannot_take_another_address(wire: Wire, attacker: Nic, victim: Nic) -> None:
    """By its driver, and by requests of its own."""
    answer = wire.tell(attacker.guest, f"shell ip link set {attacker.name} address {victim.mac}")
    assert "status=0" not in answer
    assert attacker.mac in wire.tell(attacker.guest, f"shell ip link show {attacker.name}")
    low, high = struct.unpack("<IH", pack_mac(victim.mac))
    requests = {"replace": 0x02, "add": 0x02 | 1 << 16}
    assert {name: request(wire, attacker, word, low, high) for name, word in requests.items()} == dict.fromkeys(requests, False)
    found = wire.send_from_outside({"": tagged(victim.mac, OUTSIDE, (VLAN, BLUE))})
    assert found == {"": victim.place}


def test_guest_of_a_network_cannot_join_another(wire: Wire, attacker: Nic, other: Nic, loose: Nic) -> None:
    """One in no network can: nothing stops it."""
    frames = {"": tagged(ALL, OUTSIDE, (VLAN, RED))}
    before = wire.places(RED)
    assert not request(wire, attacker, 0x04 | 1 << 16, RED)
    assert wire.send_from_outside(frames) == {"": before}
    assert request(wire, loose, 0x04 | 1 << 16, RED)
    assert wire.send_from_outside(frames) == {"": before + loose.place}
    assert request(wire, loose, 0x04, RED)
    assert wire.send_from_outside(frames) == {"": before}


@pytest.mark.parametrize("target", ["broadcast", "neighbour"])
def test_flood_delays_a_neighbour_but_does_not_stop_it(wire: Wire, attacker: Nic, victim: Nic, other: Nic, target: str) -> None:
    """The neighbour speaks to a guest of the other network, which gets no frame of the flood."""
    frame = ether(ALL if target == "broadcast" else victim.mac, attacker.mac)
    number = wire.take_number()
    wire.command(attacker.guest, f"flood {attacker.mac} {number} {frame.hex()}")
    answer = wire.tell(victim.guest, "ping 10.1.0.3 5")
    sent = int(wire.command(attacker.guest, "stop").removeprefix("sent="))
    wire.settle(attacker)
    trace = wire.counts({"": number})[""]
    print(f"\n{target}: {sent} frames sent, {dict(trace)}, beside it: {answer}")
    assert re.search(r"received=[1-5] ", answer), "ICMP does not repeat what is lost"
    assert trace["out"] >= 100
    assert not {place for place in trace if place.startswith(other.guest)}
    assert "received=5 " in wire.tell(victim.guest, "ping 10.1.0.3 5")
