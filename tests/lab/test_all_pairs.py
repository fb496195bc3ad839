"""Seven guests in two networks, as many as the NIC has VFs: each guest reaches all others of its network, and no other guest.

In a lab of its own, which has a core for each guest.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.attack_frames import ALL, IPV6, ether, solicitation
from tests.harness.guest_frames import OUT_AND_BACK, Wire
from tests.lab.conftest import LabHost, own_lab
from tests.lab.members import sent_image, watched
from tests.lab.numbered import add_ipv6, check_neighbours, check_pings, create_guest, create_networks, find_others, ipv6

pytestmark = pytest.mark.soak

SPEC = Path(__file__).parents[1] / "data/labs/pairs.toml"
GUESTS = ("blue", "blue", "blue", "blue", "red", "red", "red")


@pytest.fixture(scope="module")
def host() -> Iterator[LabHost]:
    with own_lab("test-pairs", str(SPEC)) as lab:
        yield lab


@pytest.fixture(scope="module")
def members(host: LabHost) -> Iterator[dict[str, dict[str, Any]]]:
    """By name."""
    began = time.monotonic()
    with sent_image(host):
        create_networks(host)
        made = [create_guest(host, network, number) for number, network in enumerate(GUESTS, 1)]
        for guest in made:
            host.nohype("guest", "start", guest["name"], "--wait", "400")
        print(f"\n{len(made)} guests ready after {time.monotonic() - began:.0f} s")
        yield {guest["name"]: guest for guest in made}


@pytest.fixture(scope="module")
def wire(host: LabHost, members: dict[str, dict[str, Any]]) -> Iterator[Wire]:
    with watched(host, members) as found:
        add_ipv6(found)
        yield found


def test_each_guest_has_a_vf_of_its_own(members: dict[str, dict[str, Any]]) -> None:
    assert len({nic["index"] for guest in members.values() for nic in guest["nics"]}) == len(members) == 7


def test_frames_reach_each_guest_of_the_network_and_no_other(wire: Wire) -> None:
    """Each frame leaves the host and comes back once, also if no guest receives it."""
    found = wire.trace_all({nic: {to.guest: ether(to.mac, nic.mac) for to in wire.nics if to != nic} for nic in wire.nics})
    inside, across = 0, 0
    for sender in wire.nics:
        same, others = find_others(wire, sender)
        reached = {nic.guest: OUT_AND_BACK + nic.place for nic in same}
        assert found[sender] == reached | {nic.guest: OUT_AND_BACK for nic in others}, sender
        inside, across = inside + len(same), across + len(others)
    print(f"\nunicast: {inside} pairs of a network, all reached; {across} pairs across networks, none reached")


def test_broadcasts_and_solicitations_reach_the_network_only(wire: Wire) -> None:
    """The 82576 returns them to their sender too. A solicitation is a multicast frame of IPv6 neighbour discovery."""
    frames = {nic: {"broadcast": ether(ALL, nic.mac)} for nic in wire.nics}
    for sender in wire.nics:
        for nic in (find_others(wire, sender)[0][0], find_others(wire, sender)[1][0]):
            group, payload = solicitation(sender.mac, ipv6(sender), ipv6(nic))
            frames[sender][nic.guest] = ether(group, sender.mac, IPV6, payload)
    found = wire.trace_all(frames)
    for sender in wire.nics:
        most = OUT_AND_BACK + wire.places(sender.vlan)
        assert found[sender].pop("broadcast") == most
        for nic in wire.nics:
            least = OUT_AND_BACK + (nic.place if nic.vlan == sender.vlan else Counter())
            assert nic.guest not in found[sender] or least <= found[sender][nic.guest] <= most, (sender, nic, found[sender])
    print(f"\n{len(wire.nics)} broadcasts and {2 * len(wire.nics)} solicitations stayed in their networks")


def test_guests_of_a_network_ping_each_other(wire: Wire) -> None:
    check_pings(wire)


def test_guests_of_different_networks_do_not_find_each_other(wire: Wire) -> None:
    check_neighbours(wire)
