"""Guests in the networks blue and red with the addresses 10.1.0.N and fd00::N, where N ends the guest's name."""

from __future__ import annotations

import json
import re
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from tests.harness.guest_frames import Nic, Wire
from tests.harness.guest_image import FRAMES
from tests.lab.conftest import LabHost
from tests.lab.members import BLUE, RED

VLANS = {"blue": BLUE, "red": RED}
PINGS = 3
FAMILIES = ("-4", "-6")


def create_networks(host: LabHost) -> None:
    for network, vlan in VLANS.items():
        host.nohype("network", "create", network, "--vlan", str(vlan))


def create_guest(host: LabHost, network: str, number: int) -> dict[str, Any]:
    """As the manager shows it. It gets its IPv6 address later, from ``add_ipv6``."""
    nic = f"network={network},address=10.1.0.{number}/24"
    words = (f"{network}{number}", "--memory", "128M", "--image", FRAMES, "--cmdline", "ipv6.disable=0", "--nic", nic)
    return dict(json.loads(host.nohype("guest", "create", *words, "--json").stdout))


def add_ipv6(wire: Wire) -> None:
    for nic in wire.nics:
        answer = wire.tell(nic.guest, f"shell ip -6 address add {ipv6(nic)}/64 dev {nic.name}")
        assert "status=0" in answer, answer


def ipv4(nic: Nic) -> IPv4Address:
    return IPv4Address(f"10.1.0.{nic.guest[-1]}")


def ipv6(nic: Nic) -> IPv6Address:
    return IPv6Address(f"fd00::{nic.guest[-1]}")


def find_others(wire: Wire, sender: Nic) -> tuple[list[Nic], list[Nic]]:
    """Those of its network, and those of the other network."""
    others = [nic for nic in wire.nics if nic != sender]
    return [nic for nic in others if nic.vlan == sender.vlan], [nic for nic in others if nic.vlan != sender.vlan]


def check_pings(wire: Wire) -> None:
    """Guests of a network reach each other, by IPv4 and, after neighbour discovery, by IPv6."""
    times = []
    for sender in wire.nics:
        for target in find_others(wire, sender)[0]:
            for address in (ipv4(target), ipv6(target)):
                answer = wire.tell(sender.guest, f"flood {address} {PINGS}")
                assert re.search(r" received=[1-9]\d* duplicates=0 ", answer), (sender, target, answer)
                times.append(float(re.findall(r"avg=([\d.]+)", answer)[0]))
    print(f"\n{len(times)} times {PINGS} pings, average round trip {min(times):.1f} to {max(times):.1f} ms")


def check_neighbours(wire: Wire) -> None:
    """After ``check_pings``: each guest has found all others of its network by ARP and neighbour discovery, and no other."""
    for sender in wire.nics:
        same, others = find_others(wire, sender)
        for address in [find(nic) for nic in others for find in (ipv4, ipv6)]:
            answer = wire.tell(sender.guest, f"shell ping -q -c 1 -W 1 {address}")
            assert " 0 packets received" in answer, (sender, address, answer)
        assert read_neighbours(wire, sender) == {str(find(nic)): nic.mac for nic in same for find in (ipv4, ipv6)}, sender


def read_neighbours(wire: Wire, nic: Nic) -> dict[str, str]:
    """MAC addresses by IP address, without link-local ones, of the neighbours that the guest has found."""
    shown = " ".join(wire.tell(nic.guest, f"shell ip {family} neigh") for family in FAMILIES)
    found = dict(re.findall(rf"(\S+) dev {nic.name} lladdr (\S+)", shown))
    return {address: mac for address, mac in found.items() if not address.startswith("fe80:")}
