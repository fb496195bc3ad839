"""A Linux bridge translates the VLANs of guests: interfaces, VLANs of ports, and frames. Needs the module 8021q."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from orchestrator.errors import SwitchError
from orchestrator.host.netlink import create_netns, delete_netns, read_links
from orchestrator.model.switch import PortChannel
from orchestrator.switches.base import Driver
from orchestrator.switches.bridge_commands import RemoteBridge
from orchestrator.switches.commands import LocalCommands
from orchestrator.switches.linux_bridge import LinuxBridge

NETNS = f"nhchan{os.getpid()}"
A, B, C, D = (f"02:4e:48:00:00:0{number}" for number in (1, 2, 3, 4))
ALL = (PortChannel(1000, A, 100), PortChannel(1001, B, 100), PortChannel(1002, D, 200), PortChannel(1003, C, 0))
BROADCAST = "ff:ff:ff:ff:ff:ff"
# Sends each frame (end, source, VLAN, destination) and prints the VLANs in which it arrives at both ends; 0: no tag.
SEND = """
import json, socket, struct, sys
ends = {}
for name in ("one", "two"):
    ends[name] = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    ends[name].setsockopt(263, 8, 1)  # PACKET_AUXDATA
    ends[name].bind((name, 3))
def receive(end, number):
    found = []
    end.settimeout(0.3)
    try:
        while True:
            data, extra, _, address = end.recvmsg(256, 64)
            status, tag = struct.unpack_from("<I", extra[0][2])[0], struct.unpack_from("<H", extra[0][2], 16)[0]
            if address[2] != socket.PACKET_OUTGOING and data[14:18] == number:
                found.append(tag & 0xfff if status & 16 else 0)
    except TimeoutError:
        return sorted(found)
results = []
for number, (end, source, vlan, target) in enumerate(json.loads(sys.argv[1])):
    tag = struct.pack("!HH", 0x8100, vlan) if vlan else b""
    mark = struct.pack("!I", number + 7)
    frame = bytes.fromhex((target + source).replace(":", "")) + tag + b"\\x88\\xb5" + mark + bytes(46)
    ends[end].send(frame)
    results.append([receive(ends["one"], mark), receive(ends["two"], mark)])
print(json.dumps(results))
"""


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", "-n", NETNS, *words], check=check, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bridge() -> Iterator[LinuxBridge]:
    """Two ports: of a host at `one`, and of another station at `two`, which has the VLANs 100 and 200."""
    if os.geteuid():
        pytest.skip("needs root for network namespaces")
    create_netns(NETNS)
    try:
        if ip("link", "add", "br0", "type", "bridge", "vlan_filtering", "1", check=False).returncode:
            pytest.skip("the kernel's bridges do not filter VLANs")
        ip("link", "set", "br0", "up")
        for near, port in (("one", "swp1"), ("two", "swp2")):
            ip("link", "add", near, "type", "veth", "peer", "name", port)
            ip("link", "set", port, "master", "br0")
            ip("link", "set", near, "up")
            ip("link", "set", port, "up")
        if ip("link", "add", "link", "swp1", "name", "probe", "type", "vlan", "id", "9", check=False).returncode:
            pytest.skip("the kernel has no 8021q")
        ip("link", "del", "dev", "probe")
        for vlan in ("100", "200"):
            subprocess.run(["bridge", "-n", NETNS, "vlan", "add", "dev", "swp2", "vid", vlan], check=True, timeout=60)
        yield LinuxBridge("br0", NETNS)
    finally:
        delete_netns(NETNS)


def drivers(bridge: LinuxBridge) -> list[Driver]:
    return [bridge, RemoteBridge("br0", LocalCommands(("ip", "netns", "exec", NETNS)))]


def send(*frames: tuple[str, str, int, str]) -> list[list[list[int]]]:
    words = ["ip", "netns", "exec", NETNS, sys.executable, "-c", SEND, json.dumps(frames)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout)  # type: ignore[no-any-return]


def test_vlans_of_guests_are_translated_within_their_network(bridge: LinuxBridge) -> None:
    for channel in ALL:
        bridge.set_channel("swp1", channel)
    for driver in drivers(bridge):
        ports = {port.name: port for port in driver.read().ports}
        assert ports.keys() == {"swp1", "swp2"}, "the interfaces of the VLANs are no ports of their own"
        assert ports["swp1"].channels == tuple(replace(one, mac="") for one in ALL)
    # Links come up with a delay: a broadcast arrives.
    for _ in range(50):
        if send(("one", A, 1000, BROADCAST)) == [[[1001], [100]]]:
            break
    assert send(
        ("one", A, 1000, B), ("one", B, 1001, A), ("one", A, 1000, BROADCAST), ("two", D, 100, A), ("one", D, 1002, BROADCAST)
    ) == [[[1001], []], [[1000], []], [[1001], [100]], [[1000], []], [[], [200]]]
    for ends in send(("one", A, 1000, D), ("one", D, 1002, A), ("two", D, 1000, A), ("two", D, 200, A), ("two", D, 0, A)):
        assert not {1000, 1001, 1002, 1003} & set(ends[0]), "no frame enters the network of others"


def test_translation_is_replaced_and_removed(bridge: LinuxBridge) -> None:
    for driver in drivers(bridge):
        before = driver.snapshot("swp1")
        driver.set_channel("swp1", PortChannel(1000, A, 100))
        driver.set_channel("swp1", PortChannel(1000, A, 200))
        assert driver.read(["swp1"]).ports[0].channels == (PortChannel(1000, "", 200),)
        driver.remove_channel("swp1", 1000, before)
        driver.remove_channel("swp1", 1000, before)
        driver.remove_channel("gone", 1000, before)
        assert driver.read(["swp1"]).ports[0].channels == ()
    assert not [link.name for link in read_links(netns=NETNS) if link.name.startswith("nhc")]


def test_bridge_that_cannot_keep_others_out_is_refused(bridge: LinuxBridge) -> None:
    subprocess.run(["bridge", "-n", NETNS, "vlan", "add", "dev", "swp1", "vid", "1000"], check=True, timeout=60)
    with pytest.raises(SwitchError, match="is in VLAN 1000, which is to be translated"):
        bridge.set_channel("swp1", PortChannel(1000, A, 100))
    with pytest.raises(SwitchError, match="has no port swp9"):
        bridge.set_channel("swp9", PortChannel(1001, A, 100))
    ip("link", "set", "br0", "type", "bridge", "vlan_filtering", "0")
    with pytest.raises(SwitchError, match="bridge br0 does not filter VLANs"):
        bridge.set_channel("swp1", PortChannel(1001, A, 100))
    assert not [link.name for link in read_links(netns=NETNS) if link.name.startswith("nhc")]
