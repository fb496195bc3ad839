"""A Linux bridge as external switch, always with the real kernel: what is read of its ports, and how changes are noticed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from errno import ENODEV, EOPNOTSUPP

import pytest
from pyroute2 import IPRoute, NetlinkError

from orchestrator.errors import HostError, SwitchError
from orchestrator.host.netlink import (
    LinkNotices,
    add_port,
    read_bridge,
    set_hairpin,
)
from orchestrator.model.switch import FdbEntry, PortVlan
from orchestrator.switches.linux_bridge import LinuxBridge
from tests.harness.bridge import BRIDGE, Cable, plugged

pytestmark = pytest.mark.netns

PREFIX = f"nhp{os.getpid()}"
NEAR, FAR = f"{PREFIX}n", f"{PREFIX}f"
LOCAL_EXPERIMENT = 0x88B5
SOURCE = "02:4e:48:00:00:01"
FRAME = bytes.fromhex("024e48000002" + SOURCE.replace(":", "")) + LOCAL_EXPERIMENT.to_bytes(2, "big") + bytes(50)


@pytest.fixture(autouse=True)
def _root_only() -> None:
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network namespaces need root")


@pytest.fixture
def cable() -> Iterator[Cable]:
    with plugged(PREFIX) as cable:
        yield cable


@pytest.fixture
def bridge(cable: Cable) -> LinuxBridge:
    return LinuxBridge(BRIDGE, cable.netns)


def test_port_of_a_new_bridge_is_read(bridge: LinuxBridge, cable: Cable) -> None:
    found = cable.await_forwarding()
    assert (found.name, found.up, found.carrier, found.hairpin, found.isolated) == (FAR, True, True, False, False)
    assert found.mtu == 1500
    assert found.counters
    state = bridge.read([FAR], neighbours=True)
    assert (state.vlan_filtering, state.stp, state.fail_mode, state.flows) == (False, False, None, None)
    assert any("neighbour" in gap for gap in state.ports[0].gaps)


@pytest.mark.parametrize(
    ("settings", "field"), [({"mode": 1}, "hairpin"), ({"isolated": 1}, "isolated")], ids=["hairpin", "isolated"]
)
def test_flag_that_is_set_is_read(bridge: LinuxBridge, cable: Cable, settings: dict[str, int], field: str) -> None:
    assert getattr(cable.port, field) is False
    cable.change_port(**settings)
    assert getattr(cable.port, field) is True


def test_mtu_and_link_state_are_read(bridge: LinuxBridge, cable: Cable) -> None:
    cable.set_link(mtu=1400)
    assert cable.port.mtu == 1400
    cable.set_link(state="down")
    assert (cable.port.up, cable.port.carrier, cable.port.state) == (False, False, "disabled")


def test_frames_are_counted_and_their_source_is_learned(bridge: LinuxBridge, cable: Cable) -> None:
    before = cable.await_forwarding().counters
    assert before
    with LinkNotices(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as ours:
        ours.bind((NEAR, 0))
        for _ in range(3):
            ours.send(FRAME)
    found = cable.port
    assert found.counters
    # The kernel's own IPv6 frames are counted too.
    assert found.counters.rx_packets - before.rx_packets >= 3
    assert found.counters.rx_bytes - before.rx_bytes >= 3 * len(FRAME)
    assert FdbEntry(SOURCE, None, False) in found.fdb


def test_static_address_is_read_as_static(bridge: LinuxBridge, cable: Cable) -> None:
    with IPRoute(netns=PREFIX) as ipr:
        (index,) = ipr.link_lookup(ifname=FAR)
        ipr.fdb("add", ifindex=index, lladdr=SOURCE, state=0x40, flags=0x4)
    assert FdbEntry(SOURCE, None, True) in cable.port.fdb


def test_vlans_of_a_filtering_bridge_are_read(bridge: LinuxBridge) -> None:
    with IPRoute(netns=PREFIX) as ipr:
        (master,) = ipr.link_lookup(ifname="br0")
        (index,) = ipr.link_lookup(ifname=FAR)
        try:
            ipr.link("set", index=master, kind="bridge", br_vlan_filtering=1)
        except NetlinkError as error:
            if error.code != EOPNOTSUPP:
                raise
            pytest.skip("this kernel has no VLAN filtering (CONFIG_BRIDGE_VLAN_FILTERING)")
        assert bridge.read().vlan_filtering
        ipr.vlan_filter("add", index=index, vlan_info={"vid": 100})
    assert bridge.read().ports[0].vlans == (PortVlan(1, True, True), PortVlan(100, False, False))


def test_hairpin_is_set_and_read_back(bridge: LinuxBridge, cable: Cable) -> None:
    for on in (True, True, False):
        bridge.set_hairpin(FAR, on=on)
        assert cable.port.hairpin is on


def test_hairpin_is_lost_when_a_port_leaves_and_joins(bridge: LinuxBridge, cable: Cable) -> None:
    """The reason why ports are watched."""
    bridge.set_hairpin(FAR, on=True)
    cable.set_link(state="down")
    cable.set_link(state="up")
    assert cable.port.hairpin
    cable.set_link(master=0)
    assert bridge.read().ports == ()
    add_port(BRIDGE, FAR, PREFIX)
    assert not cable.port.hairpin


def test_snapshot_is_restored(bridge: LinuxBridge, cable: Cable) -> None:
    for on in (True, False):
        bridge.set_hairpin(FAR, on=on)
        before = bridge.snapshot(FAR)
        bridge.set_hairpin(FAR, on=not on)
        bridge.restore(FAR, before)
        assert cable.port.hairpin is on
    cable.set_link(master=0)
    bridge.restore(FAR, "on")  # the port is gone


def test_interface_outside_the_bridge_is_refused(bridge: LinuxBridge) -> None:
    for name in ("lo", "br0", "nowhere"):
        with pytest.raises(SwitchError, match=f"bridge br0 has no port {name}; its ports: {FAR}"):
            bridge.set_hairpin(name, on=True)
        with pytest.raises(SwitchError, match=f"has no port {name}"):
            bridge.read([FAR, name])


@pytest.mark.parametrize(
    ("name", "netns"), [(FAR, PREFIX), ("br9", PREFIX), ("br0", f"{PREFIX}x")], ids=["port", "bridge", "netns"]
)
def test_missing_bridge_or_namespace_is_one_error(bridge: LinuxBridge, name: str, netns: str) -> None:
    for call in (lambda: LinuxBridge(name, netns).read(), lambda: LinuxBridge(name, netns).set_hairpin(FAR, on=True)):
        with pytest.raises(SwitchError, match=f"cannot read bridge {name}"):
            call()
    with pytest.raises(HostError) as caught:
        read_bridge("br9", PREFIX)
    assert caught.value.errno == ENODEV


def test_change_is_announced(bridge: LinuxBridge, cable: Cable) -> None:
    cable.await_forwarding()
    with LinkNotices(PREFIX) as notices:
        while notices.wait(0.2):
            pass
        cable.change_port(mode=1)
        assert notices.wait(30)
        assert not notices.wait(0.01)
        for on in (False, True) * 20:
            set_hairpin(FAR, PREFIX, on=on)
        assert notices.wait(30), "all that have arrived are taken at once"


def test_lost_notifications_count_as_a_change(bridge: LinuxBridge, cable: Cable) -> None:
    with LinkNotices(PREFIX) as notices:
        with IPRoute(netns=PREFIX) as ipr:
            (index,) = ipr.link_lookup(ifname=FAR)
            for number in range(600):
                ipr.brport("set", index=index, mode=number % 2)
        assert notices.wait(30)
        cable.change_port(mode=1)
        assert notices.wait(30)


def test_namespace_that_does_not_exist_cannot_be_watched() -> None:
    with pytest.raises(HostError, match=f"cannot open network namespace {PREFIX}x"):
        LinkNotices(f"{PREFIX}x")
