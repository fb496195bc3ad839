"""The network, always with the real kernel, in network namespaces that a test makes and removes. VFs: test_host_net.py."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from errno import EBUSY, EEXIST, EINVAL, ENODEV, ENOENT, EOPNOTSUPP

import pytest
from pyroute2 import IPRoute

from orchestrator.errors import HostError
from orchestrator.host.netlink import (
    add_port,
    create_bridge,
    create_netns,
    delete_netns,
    enforce_vf,
    move_to_netns,
    netns_exists,
    read_hairpin,
    read_hwmode,
    read_links,
    read_vfs,
    set_hairpin,
    set_hwmode,
    set_link_up,
    watch_links,
)
from orchestrator.model.topology import Link, VfState
from orchestrator.values import MacAddress

pytestmark = pytest.mark.netns

# Names of interfaces have at most 15 bytes; the process id keeps parallel test runs apart.
PREFIX = f"nh{os.getpid()}"
NEAR, FAR = f"{PREFIX}n", f"{PREFIX}f"
MAC = MacAddress.parse("02:4e:48:00:00:01")
LOCAL_EXPERIMENT = 0x88B5  # IEEE 802 local experimental EtherType


@pytest.fixture(autouse=True)
def _root_only() -> None:
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network namespaces need root")


@pytest.fixture
def netns() -> Iterator[str]:
    """A network namespace."""
    create_netns(PREFIX)
    yield PREFIX
    delete_netns(PREFIX)


@pytest.fixture
def wire() -> Iterator[None]:
    """A veth pair NEAR - FAR in the namespace that we are in."""
    with IPRoute() as ipr:
        ipr.link("add", ifname=NEAR, kind="veth", peer={"ifname": FAR})
    yield
    with IPRoute() as ipr:
        for index in ipr.link_lookup(ifname=NEAR):
            ipr.link("del", index=index)


def link(name: str, netns: str | None = None) -> Link:
    """The interface as it is now."""
    return next(link for link in read_links(netns=netns) if link.name == name)


def test_a_namespace_comes_and_goes() -> None:
    assert not netns_exists(PREFIX)
    create_netns(PREFIX)
    try:
        assert netns_exists(PREFIX)
        assert [link.name for link in read_links(netns=PREFIX)] == ["lo"]
        with pytest.raises(HostError, match=f"network namespace {PREFIX}.*\n.*use another name") as caught:
            create_netns(PREFIX)
        assert caught.value.errno == EEXIST
    finally:
        delete_netns(PREFIX)
    assert not netns_exists(PREFIX)
    with pytest.raises(HostError, match=f"remove network namespace {PREFIX}") as caught:
        delete_netns(PREFIX)
    assert caught.value.errno == ENOENT


def test_a_namespace_that_is_missing_is_not_made(wire: None) -> None:
    """pyroute2 would make it."""
    for call in (
        lambda: read_links(netns=PREFIX),
        lambda: create_bridge("br0", PREFIX),
        lambda: read_hairpin(NEAR, PREFIX),
        lambda: move_to_netns(NEAR, PREFIX),
    ):
        with pytest.raises(HostError, match=f"network namespace {PREFIX}") as caught:
            call()
        assert caught.value.errno == ENOENT
        assert not netns_exists(PREFIX)


def test_links_are_described(wire: None) -> None:
    near, far = link(NEAR), link(FAR)
    assert (near.kind, near.up, near.carrier, near.master) == ("veth", False, False, None)
    assert near.index != far.index
    assert near.mac
    assert near.mac != far.mac
    assert read_vfs(NEAR) == ()
    lo = link("lo")
    assert (lo.mac, lo.kind) == (None, None)


def test_a_link_goes_up_and_down(wire: None) -> None:
    set_link_up(NEAR, up=True)
    assert (link(NEAR).up, link(NEAR).carrier) == (True, False)
    set_link_up(FAR, up=True)
    assert (link(NEAR).up, link(NEAR).carrier) == (True, True)
    set_link_up(NEAR, up=False)
    assert not link(NEAR).up


def test_a_link_moves_into_a_namespace(netns: str, wire: None) -> None:
    set_link_up(FAR, up=True)
    before = link(FAR)
    move_to_netns(FAR, netns)
    assert FAR not in [link.name for link in read_links()]
    after = link(FAR, netns)
    assert (after.mac, after.up) == (before.mac, False)
    with pytest.raises(HostError, match=f"interface {FAR} does not exist") as caught:
        move_to_netns(FAR, netns)
    assert caught.value.errno == ENODEV


def test_a_link_does_not_move_where_its_name_is_taken(netns: str, wire: None) -> None:
    create_bridge(FAR, netns)
    with pytest.raises(HostError, match=f"move {FAR} to network namespace {netns}") as caught:
        move_to_netns(FAR, netns)
    assert caught.value.errno == EEXIST
    assert link(FAR).kind == "veth"


def test_a_bridge_is_up_and_neither_waits_nor_snoops(netns: str) -> None:
    create_bridge("br0", netns)
    assert (link("br0", netns).kind, link("br0", netns).up) == ("bridge", True)
    with IPRoute(netns=netns) as ipr:
        (message,) = [message for message in ipr.link("dump") if message.get_attr("IFLA_IFNAME") == "br0"]
    data = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    assert (data.get_attr("IFLA_BR_STP_STATE"), data.get_attr("IFLA_BR_MCAST_SNOOPING")) == (0, 0)
    with pytest.raises(HostError, match=f"create bridge br0 in the network namespace {netns}.*\n.*use another name") as caught:
        create_bridge("br0", netns)
    assert caught.value.errno == EEXIST


@pytest.fixture
def port(netns: str, wire: None) -> str:
    """The external switch: FAR is a port of br0 in the namespace, NEAR is the cable's end on our side."""
    create_bridge("br0", netns)
    move_to_netns(FAR, netns)
    add_port("br0", FAR, netns)
    set_link_up(NEAR, up=True)
    return netns


def test_a_port_has_its_bridge_and_is_up(port: str) -> None:
    add_port("br0", FAR, port)
    assert (link(FAR, port).master, link(FAR, port).up) == ("br0", True)


def test_a_port_of_another_bridge_stays_there(port: str) -> None:
    create_bridge("br1", port)
    with pytest.raises(HostError, match=f"add {FAR} to bridge br1: it is a port of br0") as caught:
        add_port("br1", FAR, port)
    assert caught.value.errno == EBUSY
    assert link(FAR, port).master == "br0"


@pytest.mark.parametrize(
    ("bridge", "interface", "missing"), [("br9", FAR, "br9"), ("br0", "nowhere", "nowhere")], ids=["bridge", "port"]
)
def test_no_such_bridge_or_port(port: str, bridge: str, interface: str, missing: str) -> None:
    with pytest.raises(HostError, match=f"interface {missing} does not exist") as caught:
        add_port(bridge, interface, port)
    assert caught.value.errno == ENODEV


def test_hairpin_is_off_and_can_be_switched(port: str) -> None:
    assert not read_hairpin(FAR, port)
    for on in (True, True, False):
        set_hairpin(FAR, port, on=on)
        assert read_hairpin(FAR, port) is on


@pytest.mark.parametrize("on", [True, False])
def test_with_hairpin_a_frame_comes_back_once(port: str, on: bool) -> None:
    set_hairpin(FAR, port, on=on)
    # To an unknown address, so that the bridge floods it; the receiver's filter is the EtherType.
    frame = bytes.fromhex("024e48000002" + "024e48000001") + LOCAL_EXPERIMENT.to_bytes(2, "big") + b"hairpin".ljust(50)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(LOCAL_EXPERIMENT)) as ours:
        ours.bind((NEAR, LOCAL_EXPERIMENT))
        ours.settimeout(0.5)
        assert wait_for_carrier()
        ours.send(frame)
        came_back = 0
        try:
            while True:
                data, address = ours.recvfrom(2048)
                came_back += data == frame and address[2] != socket.PACKET_OUTGOING
        except TimeoutError:
            pass
    assert came_back == int(on)


def wait_for_carrier() -> bool:
    """The kernel announces the carrier of a new veth with a little delay (linkwatch)."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if link(NEAR).carrier:
            return True
        time.sleep(0.02)
    return False


def test_what_is_no_port_has_no_hairpin(wire: None) -> None:
    with pytest.raises(HostError, match=f"{NEAR} is not a bridge port"):
        set_hairpin(NEAR, on=True)
    with pytest.raises(HostError, match=f"{NEAR} is not a bridge port") as caught:
        read_hairpin(NEAR)
    assert caught.value.errno == EINVAL


def test_a_nic_without_vfs_has_no_vf_to_reset(wire: None) -> None:
    with pytest.raises(HostError, match=f"cannot set VF 0 of {NEAR}.*\n.*no VF 0") as caught:
        enforce_vf(NEAR, VfState(0, MAC))
    assert caught.value.errno == EINVAL


def test_a_nic_without_hwmode_says_so(wire: None) -> None:
    assert read_hwmode(NEAR) is None
    with pytest.raises(HostError, match=f"set hwmode vepa on {NEAR}.*\n.*whose driver supports hwmode") as caught:
        set_hwmode(NEAR, "vepa")
    assert caught.value.errno == EOPNOTSUPP


def test_a_bridge_port_has_no_hwmode_of_its_own(wire: None) -> None:
    """It answers the same kind of dump, for its bridge."""
    bridge = f"{PREFIX}b"
    create_bridge(bridge)
    try:
        add_port(bridge, NEAR)
        assert not read_hairpin(NEAR)
        assert read_hwmode(NEAR) is None
    finally:
        with IPRoute() as ipr:
            ipr.link("del", index=link(bridge).index)


def test_no_such_interface() -> None:
    for call in (
        lambda: enforce_vf("nowhere", VfState(0, MAC)),
        lambda: set_link_up("nowhere", up=True),
        lambda: set_hwmode("nowhere", "vepa"),
        lambda: read_hwmode("nowhere"),
        lambda: set_hairpin("nowhere", on=True),
        lambda: read_hairpin("nowhere"),
    ):
        with pytest.raises(HostError, match="interface nowhere does not exist") as caught:
            call()
        assert caught.value.errno == ENODEV


def test_a_watcher_hears_of_changes(wire: None) -> None:
    heard = threading.Event()

    def watch() -> None:
        for name in watch_links():
            if name == NEAR:
                heard.set()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    end, up = time.monotonic() + 20, False
    # Again and again, since nobody tells when the watcher has begun to listen.
    while not heard.wait(0.2) and time.monotonic() < end:
        up = not up
        set_link_up(NEAR, up=up)
    assert heard.is_set()
    watcher.join(30)
    assert not watcher.is_alive()


def test_reading_links_keeps_no_descriptors() -> None:
    read_links()
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        read_links()
    assert len(os.listdir("/proc/self/fd")) <= len(before)
