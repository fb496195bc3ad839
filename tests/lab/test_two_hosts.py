"""Two labs as two hosts behind one switch: a tenant network spans both, and the networks stay apart.

Each host has a guest in each network, created by a manager that knows nothing of the other host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.attack_frames import ALL, ether
from tests.harness.guest_frames import OUT_AND_BACK, Wire
from tests.lab.conftest import LabHost, own_lab
from tests.lab.members import sent_image, watched_on
from tests.lab.numbered import add_ipv6, check_neighbours, check_pings, create_guest, create_networks, find_others

pytestmark = pytest.mark.soak

NAMES = ("test-one", "test-two")
# Prints the address that a guest of this name would get.
PLAN = """
from pathlib import Path
from orchestrator.client import Client
print(Client(Path("/run/nohype/nohyped.sock")).plan({"name": "same", "memory": "128M", "image": "minimal"})["nics"][0]["mac"])
"""
BOTH_PORTS = Counter({"out": 1, "back": 2})


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[LabHost, LabHost]]:
    first, second = NAMES
    with own_lab(first, "small") as one, own_lab(second, "small", switch_of=first) as two, sent_image(one), sent_image(two):
        yield one, two


@pytest.fixture(scope="module")
def members(hosts: tuple[LabHost, LabHost]) -> dict[str, tuple[LabHost, dict[str, Any]]]:
    """By name, each with its host."""
    found = {}
    for number, host in enumerate(hosts):
        create_networks(host)
        for place, network in enumerate(("blue", "red"), 1):
            guest = create_guest(host, network, 2 * number + place)
            found[guest["name"]] = host, guest
    for name, (host, _) in found.items():
        host.nohype("guest", "start", name, "--wait", "400")
    return found


@pytest.fixture(scope="module")
def wire(members: dict[str, tuple[LabHost, dict[str, Any]]]) -> Iterator[Wire]:
    hosts = {name: host for name, (host, _) in members.items()}
    with watched_on(hosts, [guest for _, guest in members.values()]) as found:
        add_ipv6(found)
        found.settle(*found.nics)  # the switch learns their addresses
        yield found


def test_addresses_differ_between_hosts(
    hosts: tuple[LabHost, LabHost], members: dict[str, tuple[LabHost, dict[str, Any]]]
) -> None:
    """Also of guests with the same name."""
    found = [nic["mac"] for _, guest in members.values() for nic in guest["nics"]]
    found += [host.python(PLAN).strip() for host in hosts]
    assert len(set(found)) == len(found) == 6


def test_broadcasts_reach_the_network_on_both_hosts(wire: Wire) -> None:
    """They leave the switch at both ports. Each host's NIC gives them to guests of the network only."""
    found = wire.trace_all({nic: {"": ether(ALL, nic.mac)} for nic in wire.nics})
    assert found == {nic: {"": wire.places(nic.vlan) + BOTH_PORTS} for nic in wire.nics}


def test_frames_reach_the_guest_on_the_other_host_and_no_other(wire: Wire) -> None:
    """The switch knows the addresses, and sends each frame out of one port."""
    found = wire.trace_all({nic: {to.guest: ether(to.mac, nic.mac) for to in wire.nics if to != nic} for nic in wire.nics})
    for sender in wire.nics:
        same, others = find_others(wire, sender)
        assert len(same) == 1
        reached = {nic.guest: OUT_AND_BACK + nic.place for nic in same}
        assert found[sender] == reached | {nic.guest: OUT_AND_BACK for nic in others}, sender


def test_guests_of_a_network_ping_each_other_between_hosts(wire: Wire) -> None:
    check_pings(wire)


def test_guests_of_different_networks_do_not_find_each_other(wire: Wire) -> None:
    check_neighbours(wire)
