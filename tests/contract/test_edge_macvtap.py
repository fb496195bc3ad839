"""Edge mode macvtap-vepa on a real kernel, frame by frame: two guests on one uplink, and an external switch with hairpin."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host import netlink
from orchestrator.host.edge import Tap, macvtap
from orchestrator.host.hairpin import probe_hairpin
from orchestrator.host.interfaces import read_interfaces
from orchestrator.host.netlink import RuleNotices, add_port, create_bridge, set_hairpin
from orchestrator.values import MacAddress
from orchestrator.waiting import wait_until
from tests.harness.edge_network import (
    ALL,
    FORBIDDEN,
    GROUP,
    HOST,
    MAC1,
    MAC2,
    ONE,
    PORT,
    REAL,
    SWITCH,
    THERE,
    TWO,
    UPLINK,
    Guests,
    find_differences,
)
from tests.harness.netns import ip, within

pytestmark = pytest.mark.netns


@pytest.fixture
def taps(network: None) -> None:
    for tap in (ONE, TWO):
        within(HOST, lambda tap=tap: macvtap.create(REAL, tap))  # type: ignore[misc]


@pytest.fixture
def guests(taps: None, tmp_path: Path) -> Iterator[Guests]:
    opened = Guests(macvtap.KIND, tmp_path)
    yield opened
    opened.close()


@pytest.mark.parametrize("target", [MAC2, ALL, GROUP])
def test_each_frame_leaves_the_host_and_comes_back_once(guests: Guests, target: MacAddress | str) -> None:
    assert guests.trace(guests.send(target), **THERE) == THERE


def test_frame_between_guests_does_not_come_back_without_hairpin(guests: Guests) -> None:
    set_hairpin(PORT, SWITCH, on=False)
    assert guests.trace(guests.send(MAC2), out=1) == {"out": 1}


def test_macvtap_in_bridge_mode_is_found_and_restored(guests: Guests) -> None:
    for tap in (ONE, TWO):
        ip("-n", HOST, "link", "set", tap.name, "type", "macvtap", "mode", "bridge")
    assert guests.trace(guests.send(MAC2), two=1) == {"two": 1}, "the check below would show nothing"
    assert diff(ONE) == ("nh-1: mode is bridge, expected vepa",)
    for tap in (ONE, TWO):
        within(HOST, lambda tap=tap: macvtap.restore(REAL, tap))  # type: ignore[misc]
    assert diff(ONE) == diff(TWO) == ()
    assert guests.trace(guests.send(MAC2), **THERE) == THERE


@pytest.mark.parametrize("fields", FORBIDDEN.values(), ids=FORBIDDEN)
def test_frame_that_a_guest_may_not_send_is_dropped_by_the_rules(guests: Guests, fields: dict[str, str]) -> None:
    assert guests.trace(guests.send(**fields)) == {}
    assert guests.trace(guests.send(MAC2), **THERE) == THERE
    ip("netns", "exec", HOST, "nft", "flush", "ruleset")
    assert "rules" in diff(ONE)[0]
    assert guests.trace(guests.send(**fields), out=1)["out"] == 1, "the rules are what drops it"
    within(HOST, lambda: macvtap.restore(REAL, ONE))
    assert diff(ONE) == ()
    assert guests.trace(guests.send(**fields)) == {}


def diff(tap: Tap) -> tuple[str, ...]:
    return find_differences(macvtap, tap)


def test_host_has_no_address_on_a_tap(taps: None) -> None:
    def show() -> str:
        argv = ["ip", "-n", HOST, "address", "show", "dev", ONE.name]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    def carries() -> bool:
        return "LOWER_UP" in show()

    assert wait_until(carries, timeout=20, interval=0.05)
    assert "inet" not in show()


CHANGES = {
    "nh-1: state is down, expected up": "link set nh-1 down",
    "nh-1: reception of all multicast is off, expected on": "link set nh-1 allmulticast off",
    "nh-1: address is 02:4e:48:00:00:09, expected 02:4e:48:00:00:01": "link set nh-1 address 02:4e:48:00:00:09",
    "nh-1: MTU is 1400, expected 1500": "link set nh-1 mtu 1400",
    "nh-1 does not exist": "link delete nh-1",
}


@pytest.mark.parametrize(("finding", "command"), CHANGES.items(), ids=CHANGES.values())
def test_each_change_of_a_tap_is_found(taps: None, finding: str, command: str) -> None:
    assert diff(ONE) == ()
    ip("-n", HOST, *command.split())
    assert finding in diff(ONE)
    assert diff(TWO) == ()


@pytest.mark.parametrize("change", ["down", "allmulticast off", "mtu 1400"])
def test_changed_setting_of_a_tap_is_restored(taps: None, change: str) -> None:
    ip("-n", HOST, "link", "set", ONE.name, *change.split())
    assert diff(ONE)
    within(HOST, lambda: macvtap.restore(REAL, ONE))
    assert diff(ONE) == diff(TWO) == ()


@pytest.mark.parametrize(
    "rules",
    [
        "delete table netdev nohype-nh-1",
        "flush table netdev nohype-nh-1",
        "add rule netdev nohype-nh-1 egress accept",
        "insert rule netdev nohype-nh-1 egress accept",
        'add chain netdev nohype-nh-1 more { type filter hook egress device "nh-1" priority -1; policy accept; }',
    ],
)
def test_each_change_of_the_rules_is_found(taps: None, rules: str) -> None:
    ip("netns", "exec", HOST, "nft", rules)
    assert diff(ONE) == ("nh-1: the filter rules in nftables table netdev nohype-nh-1 are missing or were changed",)
    assert diff(TWO) == ()


@pytest.mark.parametrize("change", ["flush ruleset", "add rule netdev nohype-nh-1 egress accept", "add table inet another"])
def test_change_of_any_rules_is_announced(taps: None, change: str) -> None:
    with RuleNotices(HOST) as notices:
        while notices.wait(0.2):
            pass
        assert diff(ONE) == (), "reading them changes nothing"
        assert not notices.wait(0.01)
        ip("netns", "exec", HOST, "nft", change)
        assert notices.wait(30)


def test_removal_leaves_nothing_and_can_be_repeated(taps: None) -> None:
    for _ in range(2):
        for tap in (ONE, TWO):
            within(HOST, lambda tap=tap: macvtap.remove(REAL, tap))  # type: ignore[misc]
    assert [link.name for link in netlink.read_links(netns=HOST)] == ["lo", UPLINK]
    assert subprocess.run(["ip", "netns", "exec", HOST, "nft", "list", "ruleset"], capture_output=True, check=True).stdout == b""


def test_interface_of_another_program_is_neither_used_nor_removed(network: None) -> None:
    ip("-n", HOST, "link", "add", ONE.name, "type", "bridge")
    for call in (macvtap.create, macvtap.remove):
        with pytest.raises(HostError, match="interface"):
            within(HOST, lambda call=call: call(REAL, ONE))  # type: ignore[misc]
    assert ONE.name in [link.name for link in netlink.read_links(netns=HOST)]


def test_uplink_that_is_a_bridge_port_is_refused(network: None) -> None:
    create_bridge("br1", HOST)
    add_port("br1", UPLINK, HOST)
    (found,) = [found for found in within(HOST, lambda: read_interfaces(REAL)) if found.name == UPLINK]
    assert "is a port of br1" in macvtap.check_uplink(found)
    with pytest.raises(HostError, match="busy") as caught:
        within(HOST, lambda: macvtap.create(REAL, ONE))
    assert "not a port of a bridge" in caught.value.hint


def test_missing_uplink_is_an_error(network: None) -> None:
    with pytest.raises(HostError, match="interface nic9 does not exist"):
        within(HOST, lambda: macvtap.create(REAL, Tap("nh-1", MAC1, "nic9")))


def test_address_that_another_macvtap_has_is_refused(taps: None) -> None:
    with pytest.raises(HostError) as caught:
        within(HOST, lambda: macvtap.create(REAL, Tap("nh-3", MAC1, UPLINK)))
    assert "has its address" in caught.value.hint


@pytest.mark.parametrize(("missing", "message"), [("nft", "nft` is not installed")])
def test_host_without_nft_is_refused_and_cleaned_up(
    network: None, missing: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=message) as caught:
        within(HOST, lambda: macvtap.create(REAL, ONE))
    assert "install nftables" in caught.value.hint
    within(HOST, lambda: macvtap.remove(REAL, ONE))
    assert [link.name for link in netlink.read_links(netns=HOST)] == ["lo", UPLINK]


@pytest.mark.parametrize("on", [True, False])
def test_hairpin_probe_measures_the_switch_port(network: None, on: bool) -> None:
    set_hairpin(PORT, SWITCH, on=on)
    # The ports of a bridge forward once the carrier was seen.
    expected = 1 if on else 0
    assert within(HOST, lambda: probe_hairpin(UPLINK, attempts=20 if on else 3, wait=0.5)).returned == expected


def test_probe_of_an_unusable_uplink_is_an_error(network: None) -> None:
    with pytest.raises(HostError, match="nic9"):
        within(HOST, lambda: probe_hairpin("nic9"))
    ip("-n", HOST, "link", "set", UPLINK, "down")
    with pytest.raises(HostError, match=UPLINK):
        within(HOST, lambda: probe_hairpin(UPLINK))
