"""Counting frames on a real kernel: two guests behind one VEPA uplink, and an external switch with hairpin on or off.

GUEST1 [macvlan, vepa] --+
                         +-- UPLINK (namespace HOST) == veth == PORT (namespace SWITCH, bridge)
GUEST2 [macvlan, vepa] --+
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from orchestrator.audit.switch import start_count
from orchestrator.audit.uplink import SIZE, SwitchCount, count_at_switch, measure_traffic, prove_vepa, watch_switch
from orchestrator.errors import HostError
from orchestrator.host import frames
from orchestrator.host.frames import EchoFilter, FrameCount, FrameCounter
from orchestrator.host.netlink import add_port, create_bridge, create_netns, delete_netns, set_hairpin
from orchestrator.model.proof import Measurement, Verdict
from orchestrator.model.uplink import EdgeReading, Traffic, VepaReadings
from orchestrator.switches.base import Driver
from orchestrator.switches.bridge_commands import RemoteBridge
from orchestrator.switches.commands import LocalCommands
from orchestrator.switches.linux_bridge import LinuxBridge

pytestmark = pytest.mark.netns

PREFIX = f"fr{os.getpid()}"
HOST, SWITCH, GUEST1, GUEST2 = (f"{PREFIX}{name}" for name in ("h", "s", "1", "2"))
UPLINK, PORT = "uplink", "port"
A, B = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
MACS = {GUEST1: "02:4e:48:00:00:01", GUEST2: "02:4e:48:00:00:02"}
VEPA = EdgeReading("uplink", "vepa", "macvlan in mode vepa")

# Like busybox's ping in a guest: sends, waits for the reply, counts. Arguments: address, count, size of the data.
PING = """
import socket, struct, sys
address, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
icmp.settimeout(0.1)
received = 0
for sequence in range(count):
    body = b"n" * size
    def packet(checksum):
        return struct.pack("!BBHHH", 8, 0, checksum, 77, sequence) + body
    padded = packet(0) + b"\\0" * (size % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    icmp.sendto(packet(~total & 0xFFFF), (address, 0))
    try:
        while True:
            reply = icmp.recv(4096)
            if reply[20] == 0 and struct.unpack("!HH", reply[24:28]) == (77, sequence):
                received += 1
                break
    except TimeoutError:
        pass
print(f"nohype: done ping sent={count} received={received} duplicates=0")
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def ping(target: IPv4Address, count: int, size: int = 56, source: str = GUEST1) -> str:
    argv = ["ip", "netns", "exec", source, sys.executable, "-c", PING, str(target), str(count), str(size)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def tell(_guest: str, line: str, _timeout: float) -> str:
    """The console of GUEST1: `ping ADDRESS COUNT` and `flood ADDRESS COUNT SIZE`."""
    _, address, count, *size = line.split()
    return ping(IPv4Address(address), int(count), int(size[0]) if size else 56)


@pytest.fixture(scope="module")
def _network() -> Iterator[None]:
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network namespaces need root")
    names = (HOST, SWITCH, GUEST1, GUEST2)
    for name in names:
        create_netns(name)
    try:
        create_bridge("br0", SWITCH)
        ip("-n", HOST, "link", "add", UPLINK, "up", "type", "veth", "peer", "name", PORT, "netns", SWITCH)
        add_port("br0", PORT, SWITCH)
        for guest, address, peer in ((GUEST1, A, GUEST2), (GUEST2, B, GUEST1)):
            ip("-n", HOST, "link", "add", guest, "link", UPLINK, "address", MACS[guest], "type", "macvlan", "mode", "vepa")
            ip("-n", HOST, "link", "set", guest, "netns", guest, "name", "eth0")
            ip("-n", guest, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", guest, "link", "set", "eth0", "up")
            # A fixed neighbour: without hairpin an ARP request would stay unanswered, and no echo be sent at all.
            other = B if address == A else A
            ip("-n", guest, "neighbour", "replace", str(other), "lladdr", MACS[peer], "dev", "eth0")
        yield
    finally:
        for name in names:
            delete_netns(name)


def total(count: FrameCount) -> int:
    return sum(count.incoming.values()) + sum(count.outgoing.values())


@pytest.fixture(params=["on"])
def hairpin(_network: None, request: pytest.FixtureRequest) -> bool:
    """The switch port's hairpin flag, set."""
    set_hairpin(PORT, SWITCH, on=request.param == "on")
    return bool(request.param == "on")


@pytest.mark.parametrize(("hairpin", "turned"), [("on", 10), ("off", 0)], indirect=["hairpin"])
def test_port_sees_each_frame_twice_with_hairpin_and_once_without(hairpin: bool, turned: int) -> None:
    with FrameCounter(EchoFilter(A, B), PORT, SWITCH, promiscuous=True) as requests:
        with FrameCounter(EchoFilter(B, A, reply=True), PORT, SWITCH, promiscuous=True) as replies:
            ping(B, 10)
    assert requests.count().incoming == {PORT: 10}
    assert requests.count().outgoing == ({PORT: turned} if turned else {})
    assert total(replies.count()) == 2 * turned
    assert (requests.count().dropped, replies.count().dropped) == (0, 0)


@pytest.mark.parametrize(
    ("wanted", "frames"),
    [
        (EchoFilter(), 20),
        (EchoFilter(A), 20),
        (EchoFilter(target=B), 20),
        (EchoFilter(A, B, size=56), 20),
        (EchoFilter(A, B, size=57), 0),
        (EchoFilter(B, A), 0),
        (EchoFilter(A, IPv4Address("192.0.2.3")), 0),
        (EchoFilter(A, B, reply=True), 0),
        (EchoFilter(B, A, reply=True, size=56), 20),
    ],
    ids=str,
)
def test_filter(hairpin: bool, wanted: EchoFilter, frames: int) -> None:
    with FrameCounter(wanted, PORT, SWITCH) as counter:
        ping(B, 10)
    assert total(counter.count()) == frames


def test_all_interfaces_of_a_namespace(hairpin: bool) -> None:
    """Each frame passes the uplink twice too; on the far side the bridge itself never sees what it forwards."""
    with FrameCounter(EchoFilter(A, B), netns=HOST) as host, FrameCounter(EchoFilter(A, B), netns=SWITCH) as switch:
        ping(B, 10)
    assert host.count().outgoing == {UPLINK: 10}
    assert host.count().incoming == {UPLINK: 10}
    assert switch.count().incoming == {PORT: 10}
    assert switch.count().outgoing == {PORT: 10}


def test_frames_before_and_after_do_not_count(hairpin: bool) -> None:
    ping(B, 3)
    with FrameCounter(EchoFilter(A, B), PORT, SWITCH) as counter:
        ping(B, 2)
    ping(B, 3)
    assert counter.count().incoming == {PORT: 2}


def test_frames_that_the_kernel_could_not_keep_are_reported(hairpin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that comes too late, and a receive buffer for a few frames only."""
    may_read = threading.Event()
    monkeypatch.setattr(frames, "BUFFER_BYTES", 4096)

    class Late(EchoFilter):
        def matches(self, frame: bytes) -> bool:
            may_read.wait()
            return super().matches(frame)

    with FrameCounter(Late(A, B), PORT, SWITCH) as counter:
        ping(B, 50)
        may_read.set()
    count = counter.count()
    assert count.dropped > 0
    assert total(count) + count.dropped == 100


@pytest.mark.usefixtures("_network")
def test_interface_and_namespace_that_do_not_exist() -> None:
    with pytest.raises(HostError, match="cannot count frames on nothere"), FrameCounter(EchoFilter(), "nothere"):
        pass
    with pytest.raises(HostError, match="cannot open network namespace nothere"), FrameCounter(EchoFilter(), netns="nothere"):
        pass


def test_our_own_namespace_is_left_alone(hairpin: bool) -> None:
    before = os.readlink("/proc/self/ns/net")
    with FrameCounter(EchoFilter(), PORT, SWITCH):
        assert os.readlink("/proc/self/ns/net") == before
        assert os.readlink("/proc/thread-self/ns/net") == before


def prove() -> tuple[Measurement, SwitchCount]:
    """The whole proof: the host's half in this namespace, which none of these frames crosses, and the switch's."""
    with watch_switch(LinuxBridge("br0", SWITCH), PORT) as watch:
        traffic = measure_traffic(tell, ("guest1", A), ("guest2", B), 20)
    switch = count_at_switch(watch)
    return prove_vepa(VepaReadings((VEPA,), traffic), switch), switch


def test_the_proof_passes_with_hairpin(hairpin: bool) -> None:
    proof, switch = prove()
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert switch == SwitchCount(PORT, 20, 20, 0), "the warm-up is not counted"


@pytest.mark.parametrize("hairpin", ["off"], indirect=True)
def test_the_proof_fails_without_hairpin(hairpin: bool) -> None:
    proof, switch = prove()
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 20)
    assert switch == SwitchCount(PORT, 20, 0, 0)
    assert any("the switch did not reflect 20 of 20 frames" in line for line in proof.evidence)


def test_the_proof_fails_when_the_uplink_switches_itself(hairpin: bool) -> None:
    """macvlan's bridge mode is to it what VEB is to a NIC: guests reach each other, and nothing leaves."""
    for guest in (GUEST1, GUEST2):
        ip("-n", guest, "link", "set", "eth0", "type", "macvlan", "mode", "bridge")
    try:
        proof, switch = prove()
    finally:
        for guest in (GUEST1, GUEST2):
            ip("-n", guest, "link", "set", "eth0", "type", "macvlan", "mode", "vepa")
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 20)
    assert switch == SwitchCount(PORT, 0, 0, 0)
    assert "20 of 20 frames did not reach the switch port port" in proof.evidence


def count_by_driver(driver: Driver) -> Measurement:
    """The proof, completed by the driver of the switch."""
    count = start_count(driver, PORT, (MACS[GUEST1], MACS[GUEST2]), SIZE, settle=0.0)
    traffic = measure_traffic(tell, ("guest1", A), ("guest2", B), 20, during=count.running())
    found = count.finish(traffic)
    assert isinstance(found, SwitchCount), found
    return prove_vepa(VepaReadings((VEPA,), traffic, switch=found), None)


DRIVERS: dict[str, Callable[[], Driver]] = {
    "captured": lambda: LinuxBridge("br0", SWITCH),
    "counters": lambda: RemoteBridge("br0", LocalCommands(["ip", "netns", "exec", SWITCH])),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("hairpin", "verdict"), [("on", Verdict.PASS), ("off", Verdict.FAIL)], indirect=["hairpin"])
def test_the_driver_of_the_switch_completes_the_proof(hairpin: bool, verdict: Verdict, driver: str) -> None:
    proof = count_by_driver(DRIVERS[driver]())
    assert proof.verdict == verdict, proof.evidence


def test_port_that_is_not_of_the_bridge_is_not_counted(hairpin: bool) -> None:
    count = start_count(LinuxBridge("br0", SWITCH), "lo", (MACS[GUEST1], MACS[GUEST2]), SIZE)
    with count.running():
        pass
    found = count.finish(Traffic("guest1", "guest2", SIZE, 0, 0, 0, {}, 0))
    assert found == "bridge br0 has no port lo; its ports: port"
