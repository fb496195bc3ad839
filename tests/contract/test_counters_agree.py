"""Invariants of frame counters on a real kernel: two guests' macvtaps on one uplink, and a bridge as the switch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.audit.balance import compare, take_sample
from orchestrator.host import netlink
from orchestrator.host.edge import macvtap
from orchestrator.host.edge.returns import count_returns
from orchestrator.host.netlink import read_queue, set_hairpin
from orchestrator.model.switch import Switch, SwitchDriver, SwitchTie
from orchestrator.model.uplink import EdgeReading, InvariantReading
from orchestrator.waiting import wait_until
from tests.harness.edge_network import HOST, ONE, PORT, REAL, SWITCH, TWO, UPLINK, build_network, plug
from tests.harness.netns import Tap as GuestEnd
from tests.harness.netns import build_frame, ip, within

pytestmark = pytest.mark.netns

TAPS = (ONE, TWO)
EDGES = tuple(EdgeReading(tap.name, "macvtap-vepa", "", (), UPLINK) for tap in TAPS)
TIE = SwitchTie(Switch("sw1", SwitchDriver.LINUX_BRIDGE, "br0", netns=SWITCH), PORT, None)


def _has_carrier() -> bool:
    return all(link.carrier for link in netlink.read_links() if link.name != "lo")


@pytest.fixture
def guests(tmp_path: Path) -> Iterator[list[GuestEnd]]:
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network namespaces need root")
    with build_network(silent=True):
        ends = [plug(macvtap, tap, tmp_path) for tap in TAPS]
        within(HOST, lambda: count_returns(REAL, UPLINK, [tap.mac for tap in TAPS]))
        assert wait_until(lambda: within(HOST, _has_carrier), timeout=30, interval=0.05)
        talk(ends)  # the switch learns both addresses: it floods a frame to an address that it has not learned
        yield ends
        for end in ends:
            end.close()


def measure(during: Callable[[], object]) -> dict[str, InvariantReading]:
    macs = tuple(tap.mac for tap in TAPS)
    start = within(HOST, lambda: take_sample(REAL, UPLINK, TIE, macs, is_start=True))
    during()
    end = within(HOST, lambda: take_sample(REAL, UPLINK, TIE, macs, is_start=False))
    return {one.invariant: one for one in compare(UPLINK, EDGES, start, end)}


def talk(guests: list[GuestEnd], frames: int = 50) -> None:
    for number in range(frames):
        for end, tap, other in zip(guests, TAPS, reversed(TAPS), strict=True):
            end.send(build_frame(str(other.mac), str(tap.mac), number))


def test_frames_between_guests_hold_the_invariants(guests: list[GuestEnd]) -> None:
    found = measure(lambda: talk(guests))
    assert [one.holds for one in found.values()] == [True, True, True, True], found
    assert "guests sent 100 frames" in found["guests-uplink"].text
    assert found["must-return"].text == "100 frames between guests left through uplink, 100 came back"


def test_idle_guests_hold_the_invariants(guests: list[GuestEnd]) -> None:
    assert {one.holds for one in measure(lambda: None).values()} == {True}


def test_frames_that_the_rules_drop_are_not_counted_as_sent(guests: list[GuestEnd]) -> None:
    def spoof() -> None:
        for number in range(50):
            guests[0].send(build_frame("ff:ff:ff:ff:ff:ff", "02:00:00:00:00:99", number))

    found = measure(spoof)
    assert found["guests-uplink"].holds is True, found
    assert found["must-return"].text == "0 frames between guests left through uplink, 0 came back"


def test_macvtap_in_bridge_mode_breaks_the_invariant(guests: list[GuestEnd]) -> None:
    for tap in TAPS:
        ip("-n", HOST, "link", "set", tap.name, "type", "macvtap", "mode", "bridge")
    found = measure(lambda: talk(guests))["guests-uplink"]
    assert found.holds is False, found


def test_hairpin_off_leaves_the_first_invariant_and_the_reflection_is_missing(guests: list[GuestEnd]) -> None:
    set_hairpin(PORT, SWITCH, on=False)
    found = measure(lambda: talk(guests))
    assert found["guests-uplink"].holds is True
    assert found["switch-reflected"].holds is None
    assert "100 frames arrived at the switch port, 0 left it" in found["switch-reflected"].text
    assert found["must-return"].holds is False
    assert "100 frames between guests left through uplink, 0 came back" in found["must-return"].text


def test_uplink_that_drops_a_flood_is_no_finding(guests: list[GuestEnd]) -> None:
    """A short queue that lets one frame pass at a time drops most of them."""
    ip("-n", HOST, "link", "set", UPLINK, "txqueuelen", "2")
    added = within(HOST, lambda: os.system(f"tc qdisc add dev {UPLINK} root tbf rate 100kbit burst 2000 limit 3000 2>/dev/null"))
    found = measure(lambda: talk(guests, 500))
    assert found["guests-uplink"].holds is True, found
    if not added:
        assert within(HOST, lambda: read_queue(UPLINK)).dropped > 0
