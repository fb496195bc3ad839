"""A guest's address at another port of the switch: with a real bridge and a station that sends, and each course in time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from pyroute2 import IPRoute

from orchestrator.guests.duplicates import CALM_SECONDS, Duplicates
from orchestrator.guests.switch_watch import SwitchWatch
from orchestrator.host.netlink import add_port, set_link_up
from orchestrator.model.switch import FdbEntry, Switch, SwitchDriver, SwitchPort, SwitchState
from orchestrator.switches.verify import find_strays
from orchestrator.waiting import wait_until
from tests.harness.bridge import BRIDGE, Cable, plugged
from tests.harness.netns import Watch, build_frame

MAC, OTHER = "02:4e:48:00:00:01", "02:4e:48:00:00:02"
GUESTS = {MAC: ("web", "swp1"), OTHER: ("db", "swp1")}
PORT = SwitchPort("swp1", True, True, True, "forwarding", None, 1500, (), None, (), (), None)
PREFIX = f"nhd{os.getpid()}"


def state(**macs: str) -> SwitchState:
    """Ports with the addresses that the switch has learned there."""
    ports = (replace(PORT, name=name, fdb=(FdbEntry(mac, None, False),)) for name, mac in macs.items())
    return SwitchState(tuple(ports), None, None, None, None, None)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_address_at_its_own_port_and_unknown_addresses_are_no_strays() -> None:
    assert find_strays(state(swp1=MAC, swp2="02:00:00:00:00:09"), {MAC: "swp1"}) == {}
    assert find_strays(state(swp1=MAC, swp2=MAC), {MAC: "swp1"}) == {MAC: "swp2"}


def test_station_that_takes_turns_with_the_guest_is_reported_once() -> None:
    texts: list[str] = []
    clock = Clock()
    found = Duplicates(texts.append, clock)
    for _ in range(10):
        found.inspect("sw1", state(swp2=MAC), GUESTS)
        clock.now += CALM_SECONDS / 2
        found.inspect("sw1", state(swp1=MAC), GUESTS)
    (text,) = texts
    assert text.startswith(f"switch sw1: address {MAC} of guest web was seen at port swp2, expected swp1; ")
    clock.now += CALM_SECONDS
    found.inspect("sw1", state(swp1=MAC), GUESTS)
    found.inspect("sw1", state(swp1=MAC), GUESTS)
    assert texts[1:] == [f"switch sw1: address {MAC} was not seen at another port for 60 s"]
    found.inspect("sw1", state(swp3=MAC), GUESTS)
    assert len(texts) == 3


def test_guest_that_ends_is_forgotten_silently() -> None:
    texts: list[str] = []
    clock = Clock()
    found = Duplicates(texts.append, clock)
    found.inspect("sw1", state(swp2=MAC), GUESTS)
    found.inspect("sw1", state(swp2=MAC), {})
    clock.now += 2 * CALM_SECONDS
    found.inspect("sw1", state(swp1=MAC), GUESTS)
    found.inspect("sw2", state(), {})
    assert len(texts) == 1


@pytest.fixture
def cable() -> Iterator[Cable]:
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network namespaces need root")
    with plugged(PREFIX) as cable:
        cable.await_forwarding()
        yield cable


@pytest.mark.netns
def test_station_with_the_address_of_a_guest_is_noticed_on_a_real_bridge(cable: Cable) -> None:
    with IPRoute(netns=cable.netns) as ipr:
        ipr.link("add", ifname="swp2", kind="veth", peer={"ifname": "station"})
    set_link_up("station", up=True, netns=cable.netns)
    add_port(BRIDGE, "swp2", cable.netns)
    texts: list[str] = []
    found = Duplicates(texts.append)
    guests = {MAC: ("web", cable.far)}
    watch = SwitchWatch(
        None, lambda _: (cable.far,), lambda _: {}, lambda *_: None, lambda name, now: found.inspect(name, now, guests)
    )
    watch.add(Switch("sw1", SwitchDriver.LINUX_BRIDGE, BRIDGE, netns=cable.netns))
    watch.start()
    station = Watch(cable.netns, "station")
    try:
        assert wait_until(lambda: watch.find("sw1"), timeout=30, interval=0.05)
        assert texts == []

        def send() -> list[str]:
            station.send(build_frame("ff:ff:ff:ff:ff:ff", MAC, 1))
            return texts

        wait_until(send, timeout=60, interval=0.5)
    finally:
        watch.close()
        station.close()
    (text,) = texts
    assert f"address {MAC} of guest web was seen at port swp2, expected {cable.far}" in text
