"""Edge mode nft-vepa on a real kernel, frame by frame: two guests on one uplink, and an external switch with hairpin."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host import netlink
from orchestrator.host.edge import Tap, find_link, nft
from orchestrator.host.interfaces import read_interfaces
from orchestrator.host.netlink import add_port, create_bridge, set_hairpin
from orchestrator.host.netlink.sockets import IPRoute, NetlinkError
from orchestrator.host.root import HostRoot
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
    open_end,
)
from tests.harness.netns import Watch, ip, within

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("promiscuous")]
HOST_END = "fe:4e:48:00:00:01"  # of ONE


@pytest.fixture
def promiscuous(network: None) -> None:
    within(HOST, lambda: netlink.set_promiscuous(UPLINK, on=True))


@pytest.fixture
def taps(promiscuous: None) -> None:
    for tap in (ONE, TWO):
        within(HOST, lambda tap=tap: nft.create(REAL, tap))  # type: ignore[misc]


@pytest.fixture
def guests(taps: None, tmp_path: Path) -> Iterator[Guests]:
    opened = Guests(nft.KIND, tmp_path)
    yield opened
    opened.close()


def diff(tap: Tap) -> tuple[str, ...]:
    return find_differences(nft, tap)


def restore(tap: Tap) -> None:
    within(HOST, lambda: nft.restore(REAL, tap))


def run_nft(*words: str) -> str:
    return subprocess.run(["ip", "netns", "exec", HOST, "nft", *words], capture_output=True, check=True, text=True).stdout


@pytest.mark.parametrize("target", [MAC2, ALL, GROUP])
def test_each_frame_leaves_the_host_and_comes_back_once(guests: Guests, target: MacAddress | str) -> None:
    assert diff(ONE) == diff(TWO) == ()
    assert guests.trace(guests.send(target), **THERE) == THERE


def test_full_frame_passes(guests: Guests) -> None:
    assert guests.trace(guests.send(MAC2, size=1514), **THERE) == THERE


def test_frame_between_guests_does_not_come_back_without_hairpin(guests: Guests) -> None:
    set_hairpin(PORT, SWITCH, on=False)
    assert guests.trace(guests.send(MAC2), out=1) == {"out": 1}


@pytest.mark.parametrize("fields", FORBIDDEN.values(), ids=FORBIDDEN)
def test_frame_that_a_guest_may_not_send_is_dropped_by_the_rules(guests: Guests, fields: dict[str, str]) -> None:
    assert guests.trace(guests.send(**fields)) == {}
    assert guests.trace(guests.send(MAC2), **THERE) == THERE
    # With the last rule alone they leave: the others are what drops them.
    run_nft("flush", "chain", "netdev", "nohype-nh-1", "from-guest")
    run_nft("add", "rule", "netdev", "nohype-nh-1", "from-guest", "fwd", "to", UPLINK)
    assert "rules" in diff(ONE)[0]
    assert guests.trace(guests.send(**fields), out=1)["out"] == 1
    restore(ONE)
    assert diff(ONE) == ()
    assert guests.trace(guests.send(**fields)) == {}


def test_frames_from_outside_reach_only_their_receiver(guests: Guests) -> None:
    assert guests.trace(guests.send_from_outside(MAC1), one=1) == {"one": 1}
    assert guests.trace(guests.send_from_outside(ALL), one=1, two=1) == {"one": 1, "two": 1}
    for target in ("02:00:00:00:00:99", "01:80:c2:00:00:00", "01:80:c2:00:00:0e"):
        assert guests.trace(guests.send_from_outside(target)) == {}
    for tag in (0x8100, 0x88A8):
        assert guests.trace(guests.send_from_outside(MAC1, tag=tag)) == {}


def test_own_frame_is_not_given_back(guests: Guests) -> None:
    """A guest that received its own neighbour solicitation would find its address duplicated. A forged one reaches the others."""
    assert guests.trace(guests.send_from_outside(ALL, source=str(MAC1)), two=1) == {"two": 1}


@pytest.mark.parametrize("target", [MAC2, ALL])
def test_flushed_rules_stop_all_frames(guests: Guests, target: MacAddress | str) -> None:
    run_nft("flush", "ruleset")
    ident = guests.send(target)
    for tap in (ONE, TWO):
        assert diff(tap) == (
            f"{tap.name}: the filter rules in nftables table netdev nohype-{tap.name} are missing or were changed",
        )
        restore(tap)
    assert guests.trace(ident) == {}
    assert guests.trace(guests.send(target), **THERE) == THERE


ADDRESS, ASKER = "10.99.0.1", "10.99.0.2"


def ask_for_host(source: MacAddress) -> bytes:
    """An ARP request for the address of the host."""
    sender, kind = bytes.fromhex(str(source).replace(":", "")), struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    request = kind + sender + socket.inet_aton(ASKER) + bytes(6) + socket.inet_aton(ADDRESS)
    return b"\xff" * 6 + sender + struct.pack("!H", 0x0806) + request


@pytest.mark.parametrize("drained", [True, False])
def test_flushed_rules_do_not_open_the_host(guests: Guests, drained: bool) -> None:
    """The host answers ARP on each interface for each of its addresses. The bridge that is down is what keeps the request out."""
    ip("-n", HOST, "address", "add", f"{ADDRESS}/24", "dev", UPLINK)
    run_nft("flush", "ruleset")
    if not drained:
        ip("-n", HOST, "link", "set", ONE.name, "nomaster")
        assert any("nh-1: bridge is none" in finding for finding in diff(ONE))
    watch = Watch(HOST, ONE.name)
    guests.ends[ONE.name].send(ask_for_host(MAC1))
    assert wait_until(lambda: watch.count_all("in") >= 1, timeout=20, interval=0.002)
    assert wait_until(lambda: watch.count_all("out") >= 1, timeout=0.3 if drained else 20, interval=0.002) != drained
    watch.close()
    restore(ONE)
    assert diff(ONE) == ()


def test_host_keeps_its_address_on_the_uplink(guests: Guests) -> None:
    """The rules take only what is for a guest."""
    ip("-n", HOST, "address", "add", f"{ADDRESS}/24", "dev", UPLINK)
    before = guests.port.count_all("in")
    guests.port.send(ask_for_host(MacAddress.parse("02:00:00:00:00:50")))
    assert wait_until(lambda: guests.port.count_all("in") > before, timeout=20, interval=0.002)
    assert guests.trace(guests.send(MAC2), **THERE) == THERE


def test_two_uplinks_are_used_at_once(guests: Guests, tmp_path: Path) -> None:
    ip("-n", HOST, "link", "add", "uplink2", "up", "type", "veth", "peer", "name", "port2", "netns", SWITCH)
    create_bridge("br2", SWITCH)
    add_port("br2", "port2", SWITCH)
    set_hairpin("port2", SWITCH, on=True)
    within(HOST, lambda: netlink.set_promiscuous("uplink2", on=True))
    other = Tap("nh-3", MacAddress.parse("02:4e:48:00:00:03"), "uplink2")
    within(HOST, lambda: nft.create(REAL, other))
    end, port = open_end(nft.KIND, other.name, tmp_path), Watch(SWITCH, "port2")
    guests.ends[other.name] = end
    ident = guests.send(ALL, other)
    assert wait_until(lambda: port.count(ident, "in"), timeout=20, interval=0.01)
    del guests.ends[other.name]
    assert guests.trace(ident) == {}
    assert guests.trace(guests.send(ALL), **THERE) == THERE
    assert port.count(ident + 2, "in") == 0
    end.close()
    port.close()


@pytest.mark.parametrize("again", [False, True])
def test_uplink_that_goes_and_comes_back_needs_new_rules(guests: Guests, again: bool) -> None:
    ip("-n", HOST, "link", "delete", UPLINK)
    guests.port.close()
    assert any("uplink is none, expected uplink" in finding for finding in diff(ONE))
    restore(ONE)  # refuses nothing and changes nothing: `diff` reports it
    assert diff(ONE)
    if again:
        ip("-n", HOST, "link", "add", UPLINK, "up", "type", "veth", "peer", "name", PORT, "netns", SWITCH)
        add_port("br0", PORT, SWITCH)
        set_hairpin(PORT, SWITCH, on=True)
        assert any("rules" in finding for finding in diff(ONE))
        for tap in (ONE, TWO):
            restore(tap)
            assert diff(tap) == ()
        guests.port = Watch(SWITCH, PORT)
        assert wait_until(lambda: guests.port.count(guests.send(ALL), "out"), timeout=20, interval=0.05)
        assert guests.trace(guests.send(MAC2), **THERE) == THERE


CHANGES = {
    "nh-1: state is down, expected up": "link set nh-1 down",
    f"nh-1: address is fe:4e:48:00:00:09, expected {HOST_END}": "link set nh-1 address fe:4e:48:00:00:09",
    "nh-1: MTU is 1400, expected 1500": "link set nh-1 mtu 1400",
    "nh-1: MTU is 1500, expected 1400": f"link set {UPLINK} mtu 1400",
    f"{UPLINK}: promiscuous mode is off, expected on": f"link set {UPLINK} promisc off",
    "nh-1: bridge is none, expected nb-1": "link set nh-1 nomaster",
    "nb-1: state is up, expected down": "link set nb-1 up",
}


@pytest.mark.parametrize(("finding", "command"), CHANGES.items(), ids=CHANGES.values())
def test_each_change_of_a_tap_is_found_and_restored(taps: None, finding: str, command: str) -> None:
    assert diff(ONE) == ()
    ip("-n", HOST, *command.split())
    assert finding in diff(ONE)
    assert bool(diff(TWO)) == (UPLINK in command)
    restore(ONE)
    assert diff(ONE) == ()


@pytest.mark.parametrize("name", ["nh-1", "nb-1"])
def test_missing_interface_is_found(taps: None, name: str) -> None:
    ip("-n", HOST, "link", "delete", name)
    assert diff(ONE)
    restore(ONE)
    assert (diff(ONE) == ()) == (name == "nb-1"), "a tap that QEMU has open cannot be replaced"


@pytest.mark.parametrize(
    "rules",
    [
        "delete table netdev nohype-nh-1",
        "flush table netdev nohype-nh-1",
        "flush chain netdev nohype-nh-1 to-guest",
        "insert rule netdev nohype-nh-1 from-guest accept",
        "chain netdev nohype-nh-1 from-guest { policy accept; }",
        'add chain netdev nohype-nh-1 more { type filter hook ingress device "nh-1" priority -1; policy accept; }',
        "add chain netdev nohype-nh-1 more",
    ],
)
def test_each_change_of_the_rules_is_found(taps: None, rules: str) -> None:
    run_nft(rules)
    assert diff(ONE) == ("nh-1: the filter rules in nftables table netdev nohype-nh-1 are missing or were changed",)
    assert diff(TWO) == ()
    restore(ONE)
    assert diff(ONE) == ()


def test_uplink_of_a_tap_is_read_from_its_rules(taps: None) -> None:
    def find() -> str:
        link = find_link(REAL, ONE.name)
        assert link
        return nft.find_uplink(REAL, link)

    assert within(HOST, find) == UPLINK
    run_nft("flush", "ruleset")
    assert within(HOST, find) == ""


def test_host_has_no_address_on_a_tap(guests: Guests) -> None:
    show = ["ip", "-n", HOST, "address", "show", "dev"]
    for name in ("nh-1", "nb-1"):
        assert "inet" not in subprocess.run([*show, name], capture_output=True, text=True, check=True).stdout


def test_only_root_can_attach_to_a_tap(taps: None) -> None:
    text = subprocess.run(["ip", "-n", HOST, "tuntap", "show"], capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("nh-1:")]
    assert {"persist", "vnet_hdr", "user", "0"} <= set(line.split())


def test_removal_leaves_nothing_and_can_be_repeated(taps: None) -> None:
    for _ in range(2):
        for tap in (ONE, TWO):
            within(HOST, lambda tap=tap: nft.remove(REAL, tap))  # type: ignore[misc]
    assert [link.name for link in netlink.read_links(netns=HOST)] == ["lo", UPLINK]
    assert run_nft("list", "ruleset") == ""


class NetWithUdev:
    """Changes the address of a new tap, as udev does that has read the first one before it was set."""

    def __getattr__(self, name: str) -> object:
        return getattr(netlink, name)

    def create_tap(self, name: str, uplink: str, mac: MacAddress, drain: str) -> None:
        netlink.create_tap(name, uplink, mac, drain)
        ip("link", "set", name, "address", "22:63:88:d6:b7:3f")


def test_address_that_udev_has_changed_is_restored(promiscuous: None) -> None:
    host = HostRoot(Path("/"), NetWithUdev())  # type: ignore[arg-type]
    within(HOST, lambda: nft.create(host, ONE))
    assert diff(ONE) == ()


def test_tap_with_an_address_of_udev_is_removed(taps: None) -> None:
    ip("-n", HOST, "link", "set", ONE.name, "address", "22:63:88:d6:b7:3f")
    within(HOST, lambda: nft.remove(REAL, ONE))
    assert [link.name for link in netlink.read_links(netns=HOST) if link.name.endswith("-1")] == []


def test_tap_of_another_program_is_not_removed(network: None) -> None:
    ip("-n", HOST, "tuntap", "add", ONE.name, "mode", "tap")
    with pytest.raises(HostError, match="cannot remove tap nh-1: the interface nh-1 is tun with address"):
        within(HOST, lambda: nft.remove(REAL, ONE))
    assert ONE.name in [link.name for link in netlink.read_links(netns=HOST)]


@pytest.mark.parametrize("name", ["nh-1", "nb-1"])
def test_interface_of_another_program_is_neither_used_nor_removed(network: None, name: str) -> None:
    ip("-n", HOST, "link", "add", name, "type", "bridge")
    for call in (nft.create, nft.remove):
        with pytest.raises(HostError, match="interface"):
            within(HOST, lambda call=call: call(REAL, ONE))  # type: ignore[misc]
    assert name in [link.name for link in netlink.read_links(netns=HOST)]


def test_uplink_that_is_a_bridge_port_is_refused(network: None) -> None:
    create_bridge("br1", HOST)
    add_port("br1", UPLINK, HOST)
    (found,) = [found for found in within(HOST, lambda: read_interfaces(REAL)) if found.name == UPLINK]
    assert "is a port of br1" in nft.check_uplink(found)


@pytest.mark.parametrize("kind", ["macvlan", "macvtap"])
def test_uplink_that_carries_another_software_edge_is_refused(network: None, kind: str) -> None:
    ip("-n", HOST, "link", "add", "mv0", "link", UPLINK, "type", kind, "mode", "bridge")
    with pytest.raises(HostError, match=rf"the uplink carries mv0 \({kind}\)"):
        within(HOST, lambda: nft.create(REAL, ONE))
    assert ONE.name not in [link.name for link in netlink.read_links(netns=HOST)]


def test_missing_uplink_is_an_error_and_leaves_nothing(network: None) -> None:
    with pytest.raises(HostError, match="interface nic9 does not exist"):
        within(HOST, lambda: nft.create(REAL, Tap("nh-1", MAC1, "nic9")))
    assert [link.name for link in netlink.read_links(netns=HOST)] == ["lo", UPLINK]


def test_kernel_without_bridges_is_an_error_that_names_them(network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(IPRoute):  # type: ignore[misc]
        def link(self, command: str, **words: object) -> object:
            if words.get("kind") == "bridge":
                raise NetlinkError(errno.EOPNOTSUPP, "Unknown device type")
            return self.__getattr__("link")(command, **words)

    monkeypatch.setattr("orchestrator.host.netlink.sockets.IPRoute", Refusing)
    with pytest.raises(HostError, match="cannot create tap nh-1") as caught:
        within(HOST, lambda: nft.create(REAL, ONE))
    assert caught.value.hint == "load the module bridge: modprobe bridge"


def test_uplink_that_is_not_promiscuous_is_an_error(network: None) -> None:
    within(HOST, lambda: netlink.set_promiscuous(UPLINK, on=False))
    with pytest.raises(HostError, match="promiscuous mode is off, expected on"):
        within(HOST, lambda: nft.create(REAL, ONE))


def test_host_without_nft_is_refused_and_cleaned_up(network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="nft` is not installed") as caught:
        within(HOST, lambda: nft.create(REAL, ONE))
    assert "install nftables" in caught.value.hint
    within(HOST, lambda: nft.remove(REAL, ONE))
    assert [link.name for link in netlink.read_links(netns=HOST)] == ["lo", UPLINK]


def test_kernel_without_the_rules_is_refused_with_what_it_lacks(
    network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nft"
    program.write_text("#!/bin/sh\necho 'Error: Could not process rule: No such file or directory' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="Could not process rule") as caught:
        within(HOST, lambda: nft.create(REAL, ONE))
    assert "NFT_FWD_NETDEV and NFT_DUP_NETDEV" in caught.value.hint
    assert not within(HOST, lambda: find_link(REAL, ONE.name)).up  # type: ignore[union-attr]
