"""Tenant networks on the real kernel and NIC: three guests with seven VFs in two networks, and what keeps them apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import Any

import pytest

from orchestrator.host.frames import EchoFilter, FrameCounter
from orchestrator.lab import switch
from orchestrator.model.proof import Verdict
from orchestrator.waiting import wait_until
from tests.lab.conftest import LabHost
from tests.lab.members import BLUE, NICS, RED
from tests.lab.test_manager import MEMORY, survey

# Sends ICMP echo requests to the host, as the switch would: interface, VLAN (0: no tag), destination, addresses, size, count.
SEND = """
import socket, struct, sys
interface, vlan, target, source_ip, target_ip, size, count = sys.argv[1:]
def sum16(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    return ~((total & 0xffff) + (total >> 16)) & 0xffff
icmp = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + bytes(int(size))
icmp = icmp[:2] + struct.pack("!H", sum16(icmp)) + icmp[4:]
head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 1, 0, 64, 1, 0, *map(socket.inet_aton, (source_ip, target_ip)))
head = head[:10] + struct.pack("!H", sum16(head)) + head[12:]
tag = struct.pack("!HH", 0x8100, int(vlan)) if int(vlan) else b""
frame = bytes.fromhex(target.replace(":", "")) + bytes.fromhex("020000000099") + tag + b"\\x08\\x00" + head + icmp
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
    out.bind((interface, 0))
    for _ in range(int(count)):
        out.send(frame)
"""


@pytest.fixture(scope="module")
def before(host: LabHost) -> Any:
    return survey(host)


@pytest.fixture(scope="module")
def members(host: LabHost, before: Any) -> Iterator[dict[str, dict[str, Any]]]:
    try:
        for name, vlan in (("blue", BLUE), ("red", RED)):
            host.nohype("network", "create", name, "--vlan", str(vlan))
        for name, nics in NICS.items():
            words = [word for nic in nics for word in ("--nic", nic)]
            words += ["--cmdline", "ipv6.disable=0"]  # the image disables IPv6
            host.nohype("guest", "create", name, *MEMORY, *words)
        yield dict(zip(NICS, host.await_ready(*NICS), strict=True))
    finally:
        for name in NICS:
            host.nohype("guest", "delete", name, check=False)
        for name in ("blue", "red"):
            host.nohype("network", "delete", name, check=False)


def ping(host: LabHost, guest: str, address: str, count: int = 3) -> int:
    """How many replies came."""
    answer = host.nohype("guest", "tell", guest, f"ping {address} {count}").stdout
    match = re.search(r"nohype: done ping sent=(\d+) received=(\d+) duplicates=0", answer)
    assert match, answer
    assert int(match[1]) == count
    return int(match[2])


def send(port: switch.LabPort, vlan: int, nic: dict[str, Any], target: str, size: int) -> None:
    words = [port.interface, str(vlan), nic["mac"], "10.1.0.1", target, str(size), "20"]
    subprocess.run(["ip", "netns", "exec", port.netns, sys.executable, "-c", SEND, *words], check=True, timeout=60)


def test_pf_enforces_vlan_address_and_rate(host: LabHost, members: dict[str, dict[str, Any]]) -> None:
    lines = host.run("ip link show nic0").stdout.splitlines()
    vfs = {int(match[1]): line for line in lines if (match := re.match(r" +vf (\d+) ", line))}
    nics = [nic for guest in members.values() for nic in guest["nics"]]
    assert len({nic["index"] for nic in nics}) == len(vfs) == 7
    for nic in nics:
        line = vfs[nic["index"]]
        assert nic["mac"] in line
        assert "spoof checking on" in line
        assert "trust off" in line
        assert (f"vlan {nic['vlan']}" in line) == bool(nic["vlan"])
        assert ("max_tx_rate 100Mbps" in line or "tx rate 100 (Mbps)" in line) == (nic["rate"] == 100)
    assert {nic["vlan"] for nic in nics} == {BLUE, RED, 0}


@pytest.mark.usefixtures("members")
@pytest.mark.parametrize(
    ("source", "target"), [("net-a", "10.1.0.5"), ("net-b", "10.1.0.1"), ("net-a", "10.1.0.3"), ("net-c", "10.1.0.2")]
)
def test_members_of_a_network_reach_each_other(host: LabHost, source: str, target: str) -> None:
    """Each frame leaves the host and comes back, once."""
    port = switch.port(host.lab.name)
    wanted = EchoFilter(target=IPv4Address(target))
    ping(host, source, target)  # resolves the address: until the switch has learned it, it floods
    with FrameCounter(wanted, port.interface, port.netns, promiscuous=True) as counter:
        assert ping(host, source, target) == 3
    count = counter.count()
    assert (sum(count.incoming.values()), sum(count.outgoing.values()), count.dropped) == (3, 3, 0)


@pytest.mark.usefixtures("members")
@pytest.mark.parametrize(("source", "target"), [("net-b", "10.1.0.3"), ("net-c", "10.1.0.5")])
def test_networks_do_not_reach_each_other(host: LabHost, source: str, target: str) -> None:
    assert ping(host, source, target, 2) == 0


@pytest.mark.usefixtures("members")
@pytest.mark.soak
def test_neighbour_discovery_works_and_stays_in_the_network(host: LabHost) -> None:
    """The NIC returns a guest's own multicast frames: without RFC 7527 the address would be refused as a duplicate."""
    assert ping(host, "net-a", "fd00::5") == 3
    assert ping(host, "net-b", "fd00::1") == 3
    assert ping(host, "net-c", "fd00::1", 2) == 0, "its NIC is in no network"
    assert ping(host, "net-b", "fd00::3", 2) == 0


def test_frames_with_another_tag_do_not_reach_the_guest(host: LabHost, members: dict[str, dict[str, Any]]) -> None:
    """The guest answers what it receives: the requests differ in their size."""
    nic, port = members["net-b"]["nics"][0], switch.port(host.lab.name)
    ping(host, "net-b", "10.1.0.1")  # resolves the address that the requests seem to come from
    sizes = {RED: 100, 0: 102, BLUE: 104}
    wanted = {vlan: EchoFilter(IPv4Address("10.1.0.5"), reply=True, size=size) for vlan, size in sizes.items()}
    counters = {vlan: FrameCounter(one, port.interface, port.netns, promiscuous=True) for vlan, one in wanted.items()}

    def count(vlan: int) -> int:
        return sum(counters[vlan].count().incoming.values())

    with ExitStack() as stack:
        for counter in counters.values():
            stack.enter_context(counter)
        for vlan, size in sizes.items():
            send(port, vlan, nic, "10.1.0.5", size)
        assert wait_until(lambda: count(BLUE) >= 10, timeout=30, interval=0.1), "the last that were sent"
    assert (count(RED), count(0)) == (0, 0)


def test_proof_passes(host: LabHost, members: dict[str, dict[str, Any]]) -> None:
    proofs = host.proofs()
    found = {name: proofs["network-isolated", name] for name in members}
    assert {name: proof.verdict for name, proof in found.items()} == dict.fromkeys(members, Verdict.PASS), found


def test_proof_fails_with_the_reason(host: LabHost, members: dict[str, dict[str, Any]]) -> None:
    """A fault in each guest, and one audit."""
    faults = {
        "net-a": (0, "trust on", "trust off", "trusted"),
        "net-b": (0, f"vlan {RED}", f"vlan {BLUE}", f"port VLAN is {RED}, expected {BLUE}"),
        "net-c": (1, "spoofchk off", "spoofchk on", "spoof check is off"),
    }
    with ExitStack() as stack:
        for name, (number, change, back, _) in faults.items():
            vf = f"ip link set nic0 vf {members[name]['nics'][number]['index']}"
            stack.enter_context(host.changed(f"{vf} {change}", f"{vf} {back}"))
        proofs = host.proofs()
    for name, (_, _, _, says) in faults.items():
        proof = proofs["network-isolated", name]
        assert proof.verdict is Verdict.FAIL, name
        assert says in "\n".join(proof.evidence)


@pytest.mark.usefixtures("members")
def test_network_in_use_is_not_deleted(host: LabHost) -> None:
    done = host.nohype("network", "delete", "red", check=False)
    assert done.status == 1
    assert "network red is in use by guests: net-a, net-c" in done.stderr


@pytest.mark.usefixtures("members")
def test_rate_that_the_driver_refuses(host: LabHost) -> None:
    """More than the speed of the link (igb_ndo_set_vf_bw())."""
    host.nohype("guest", "delete", "net-c")
    done = host.nohype("guest", "create", "fast", *MEMORY, "--nic", "rate=100000", check=False)
    assert done.status == 1
    assert "to 100000 Mbit/s" in done.stderr
    assert "omit rate" in done.stderr
    shown = json.loads(host.nohype("guest", "list", "--json").stdout)
    assert {guest["name"] for guest in shown} == {"net-a", "net-b"}


@pytest.mark.usefixtures("members")
def test_deleted_guests_leave_their_vfs_as_they_were(host: LabHost, before: Any) -> None:
    """The last test of the module."""
    for name in ("net-a", "net-b"):
        host.nohype("guest", "delete", name)
    for name in ("blue", "red"):
        host.nohype("network", "delete", name)
    assert "vlan" not in host.run("ip link show nic0").stdout
    assert survey(host) == before
