"""The driver of Open vSwitch with the real daemons, and frames that are counted at the ends of real cables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from orchestrator.errors import OrchestratorError, SwitchError
from orchestrator.images.cache import cache_folder
from orchestrator.lab.build import build_switch_tools
from orchestrator.model.proof import Verdict
from orchestrator.model.switch import PairCount, PortChannel, PortNeeds, SwitchPort
from orchestrator.switches.commands import LocalCommands
from orchestrator.switches.openvswitch import OpenVSwitch
from orchestrator.switches.verify import check_ports
from tests.harness.openvswitch import BRIDGE, Daemons, Tap, Wire, running

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for mount and network namespaces"),
]

PREFIX = f"nho{os.getpid()}"
A, B, C, D = (f"02:4e:48:00:00:0{number}" for number in (1, 2, 3, 4))
ALL = (PortChannel(1000, A, 100), PortChannel(1001, B, 100), PortChannel(1002, D, 200))
BROADCAST = "ff:ff:ff:ff:ff:ff"
RESERVED = "01:80:c2:00:00:0e"
_NUMBERS = count(1)


@pytest.fixture(scope="module")
def tools() -> Path:
    try:
        return build_switch_tools(cache_folder())
    except OrchestratorError as error:
        pytest.skip(f"the root with Open vSwitch cannot be built: {error.message}")


@dataclass
class World:
    daemons: Daemons
    one: Wire  # to port p1, with the host whose guests are A and B
    two: Wire  # to port p2, with the station C

    @property
    def driver(self) -> OpenVSwitch:
        return self.daemons.driver

    def count(self, source: str, target: str, wire: Wire | None = None) -> tuple[int, int]:
        """Sends a frame, and returns how often it arrives at both ends; at the sender's only what the switch returned."""
        number = next(_NUMBERS)
        (wire or self.one).send(source, target, number)
        return self.one.receive(number, 0.2), self.two.receive(number, 0.05)

    def learn(self) -> None:
        """Each station has sent once. The first frames of a cable may be lost, so until they arrive."""
        for source, wire, other in ((A, self.one, 1), (B, self.one, 1), (C, self.two, 0)):
            for _ in range(100):
                if self.count(source, BROADCAST, wire)[other]:
                    break
            else:
                pytest.fail(f"no frame of {source} passed the switch")


@pytest.fixture
def world(tmp_path: Path, tools: Path) -> Iterator[World]:
    with (
        running(tmp_path, tools) as daemons,
        daemons.plug(PREFIX, 1) as one,
        daemons.plug(PREFIX, 2) as two,
    ):
        yield World(daemons, one, two)


def port(world: World, name: str = "p1") -> SwitchPort:
    return world.driver.read([name]).ports[0]


def failed(world: World, name: str = "p1") -> set[str]:
    checks = check_ports("sw1", world.driver.read([name]), {name: 1500})
    return {check.name for check in checks if check.verdict is Verdict.FAIL}


def test_new_bridge_does_not_reflect_and_is_found_out(world: World) -> None:
    world.learn()
    assert world.count(A, B) == (0, 0)
    assert world.count(A, C) == (0, 1)
    state = world.driver.read()
    assert (state.fail_mode, state.flows, state.other_flows) == ("standalone", 0, 1)
    assert failed(world) == {"hairpin", "fail-mode", "flows", "other-flows"}


def test_port_with_hairpin_reflects_once_and_others_do_not(world: World) -> None:
    world.driver.set_hairpin("p1", on=True)
    world.learn()
    assert (port(world).hairpin, port(world, "p2").hairpin) == (True, False)
    assert world.count(A, B) == (1, 0)
    assert world.count(B, A) == (1, 0)
    assert world.count(A, C) == (0, 1)
    assert world.count(C, A, world.two) == (1, 0)
    assert world.count(A, BROADCAST) == (1, 1)
    assert world.count(C, BROADCAST, world.two) == (1, 0)
    assert world.count(C, "02:4e:48:00:00:99", world.two) == (1, 0), "an unknown address is flooded"
    assert world.count(A, RESERVED) == (0, 0)
    assert failed(world) == set()
    assert failed(world, "p2") == {"hairpin"}


def test_facts_of_a_port_are_read(world: World) -> None:
    world.driver.set_hairpin("p1", on=True)
    world.learn()
    found = port(world)
    assert (found.up, found.carrier, found.state, found.isolated, found.mtu) == (True, True, "forwarding", None, 1500)
    assert {entry.mac for entry in found.fdb} >= {A, B}
    assert found.counters
    world.daemons.run("ovs-vsctl", "set", "port", "p1", "tag=100")
    assert [vlan.id for vlan in port(world).vlans] == [100]
    assert any("tag 100" in gap for gap in port(world).gaps)
    world.daemons.run("ip", "link", "set", "p1", "down")
    for _ in range(100):
        if not port(world).up:
            break
    assert failed(world) == {"forwarding"}


def test_bound_addresses_are_accepted_from_their_port_only_and_counted(world: World) -> None:
    world.driver.set_hairpin("p1", on=True, macs=(B, A))
    world.learn()
    before = {(pair.source, pair.target): pair.frames for pair in port(world).pairs}
    assert before.keys() == {(A, B), (B, A)}
    for _ in range(5):
        assert world.count(A, B) == (1, 0)
    assert world.count(B, A) == (1, 0)
    assert world.count(A, C, world.two) == (0, 0), "a forged source at another port"
    assert world.count(C, A, world.two) == (1, 0)
    for _ in range(200):  # the counters lag
        after = [replace_count(pair, before) for pair in port(world).pairs]
        if sum(pair.frames for pair in after) >= 6:
            break
    assert set(after) == {PairCount(A, B, 5), PairCount(B, A, 1)}
    assert [entry.mac for entry in port(world).fdb if entry.static] == [A, B]


def replace_count(pair: PairCount, before: dict[tuple[str, str], int]) -> PairCount:
    return PairCount(pair.source, pair.target, pair.frames - before[pair.source, pair.target])


def test_hairpin_off_forwards_without_reflecting(world: World) -> None:
    world.driver.set_hairpin("p1", on=True)
    world.driver.set_hairpin("p1", on=False)
    world.learn()
    assert world.count(A, B) == (0, 0)
    assert world.count(A, C) == (0, 1)
    assert failed(world) == {"hairpin"}


def test_restart_of_vswitchd_is_found_out_and_fails_closed(world: World) -> None:
    world.driver.set_hairpin("p1", on=True)
    world.learn()
    world.daemons.kill_vswitchd()
    with pytest.raises(SwitchError):
        world.driver.read()
    world.daemons.start_vswitchd()
    assert failed(world) >= {"hairpin", "flows"}
    assert world.driver.read().fail_mode == "secure"
    assert world.count(A, B) == (0, 0)
    assert world.count(A, C) == (0, 0)
    world.driver.set_hairpin("p1", on=True)
    world.learn()
    assert world.count(A, B) == (1, 0)


@pytest.mark.parametrize("mode", ["", "standalone", "secure"])
def test_snapshot_is_restored(world: World, mode: str) -> None:
    if mode:
        world.daemons.run("ovs-vsctl", "set-fail-mode", BRIDGE, mode)
    before, flows = world.driver.snapshot("p1"), read_flows(world)
    for _ in range(2):  # a second restore changes nothing
        world.driver.set_hairpin("p1", on=True, macs=(A,))
        world.driver.restore("p1", before)
        world.driver.restore("p1", before)
        assert world.daemons.run("ovs-vsctl", "get-fail-mode", BRIDGE).strip() == mode
        assert read_flows(world) == flows


def read_flows(world: World) -> list[str]:
    return world.daemons.run("ovs-ofctl", "--no-stats", "--no-names", "dump-flows", BRIDGE).splitlines()


def test_restore_keeps_the_table_while_another_port_reflects(world: World) -> None:
    before = world.driver.snapshot("p1")
    world.driver.set_hairpin("p1", on=True)
    world.driver.set_hairpin("p2", on=True, macs=(C,))
    world.driver.restore("p1", before)
    assert (port(world).hairpin, port(world, "p2").hairpin) == (False, True)
    assert [entry.mac for entry in port(world, "p2").fdb if entry.static] == [C]


def test_restore_leaves_nothing_of_a_port_that_was_removed(world: World) -> None:
    """Another port would get its number, and would reflect."""
    before, flows = world.driver.snapshot("p1"), read_flows(world)
    world.driver.set_hairpin("p1", on=True)
    world.daemons.run("ovs-vsctl", "del-port", BRIDGE, "p1")
    world.driver.restore("p1", before)
    assert read_flows(world) == flows
    assert world.daemons.run("ovs-vsctl", "get-fail-mode", BRIDGE).strip() == ""


def test_flows_of_others_are_left_alone(world: World) -> None:
    world.daemons.run("ovs-ofctl", "add-flow", BRIDGE, "priority=7,in_port=2,actions=drop")
    with pytest.raises(SwitchError, match="1 flows that the manager did not create.*\n.*bridge of its own"):
        world.driver.set_hairpin("p1", on=True)
    assert (world.driver.read().flows, world.driver.read().fail_mode) == (0, "standalone")
    assert "priority=7,in_port=2 actions=drop" in "".join(read_flows(world))


def test_flow_that_is_added_later_is_found(world: World) -> None:
    world.driver.set_hairpin("p1", on=True)
    world.daemons.run("ovs-ofctl", "add-flow", BRIDGE, "priority=500,in_port=1,actions=drop")
    assert failed(world) == {"other-flows"}


def test_missing_bridge_port_or_daemon_is_one_error(world: World) -> None:
    with pytest.raises(SwitchError, match="no bridge br9|br9 is not a bridge"):
        OpenVSwitch("br9", LocalCommands(world.daemons.prefix)).read()
    for name in ("p9", BRIDGE):
        with pytest.raises(SwitchError, match=f"has no port {name}"):
            world.driver.set_hairpin(name, on=True)
    with pytest.raises(SwitchError, match="omit the addresses|addresses are bound"):
        world.driver.set_hairpin("p1", on=False, macs=(A,))
    world.daemons.stop()
    with pytest.raises(SwitchError, match="ovs-"):
        world.driver.read()


@pytest.fixture
def channels(world: World) -> str:
    """A and B in the network with VLAN 100 and guest D in that with VLAN 200, all behind p1; returns what was before."""
    before = world.driver.snapshot("p1")
    for channel in (PortChannel(1000, A, 100), PortChannel(1001, B, 100), PortChannel(1002, D, 200)):
        world.driver.set_channel("p1", channel)
    return before


def tags(world: World, source: str, vlan: int, target: str, wire: Wire | None = None) -> tuple[list[int], list[int]]:
    """Sends a tagged frame, and returns the VLANs in which it arrives at both ends."""
    number = next(_NUMBERS)
    with Tap(world.one) as one, Tap(world.two) as two:
        (wire or world.one).send(source, target, number, vlan)
        return one.receive(number, 0.2), two.receive(number, 0.05)


def test_vlans_of_guests_are_translated_within_their_network(world: World, channels: str) -> None:
    world.learn()
    assert tags(world, A, 1000, B) == ([1001], []), "once, and only to the other guest"
    assert tags(world, B, 1001, A) == ([1000], [])
    assert tags(world, A, 1000, BROADCAST) == ([1001], [100])
    assert tags(world, A, 1000, "33:33:00:00:00:01") == ([1001], [100])
    assert tags(world, D, 1002, BROADCAST) == ([], [200])
    assert tags(world, C, 100, A, world.two) == ([1000], []), "a station of the network on another port"
    assert tags(world, C, 100, BROADCAST, world.two)[0] == [100, 1000, 1001]
    assert failed_with(world, PortNeeds(relay=False, channels=ALL, known=ALL)) == set()


def test_no_frame_enters_the_network_of_others(world: World, channels: str) -> None:
    world.learn()
    far = world.two
    for source, vlan, target, wire in (
        (A, 1000, D, None),  # to a guest of another network
        (D, 1002, A, None),
        (B, 1000, A, None),  # from another address than the guest's
        (D, 1000, B, None),
        (A, 1000, RESERVED, None),
        (C, 1000, A, far),  # from another port, with the guest's own VLAN
        (C, 200, A, far),
        (C, 0, A, far),
        (C, 1002, BROADCAST, far),
    ):
        here, _ = tags(world, source, vlan, target, wire)
        assert not {1000, 1001, 1002} & set(here), (source, vlan, target)


def test_untagged_stations_are_reached_from_vlans_of_guests(world: World) -> None:
    for channel in (PortChannel(1000, A, 0), PortChannel(1001, B, 0)):
        world.driver.set_channel("p1", channel)
    world.learn()
    assert tags(world, A, 1000, B) == ([1001], [])
    assert tags(world, A, 1000, C) == ([], [0])
    assert tags(world, C, 0, A, world.two) == ([1000], [])
    assert tags(world, A, 1000, BROADCAST) == ([1001], [0])


def test_translations_are_undone_and_hairpin_stays(world: World, channels: str) -> None:
    world.driver.set_hairpin("p1", on=True)
    assert port(world).channels == ALL, "setting hairpin keeps them"
    world.driver.set_channel("p1", PortChannel(1001, B, 200))
    assert port(world).channels[1].switch_vlan == 200
    for vlan in (1000, 1001, 1002, 1000):
        world.driver.remove_channel("p1", vlan, channels)
    assert (port(world).channels, port(world).hairpin) == ((), True)
    world.driver.restore("p1", channels)
    state = world.driver.read()
    assert (state.fail_mode, state.flows, state.other_flows) == ("standalone", 0, 1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_guests_that_end_in_any_order_leave_the_bridge_as_it_was(world: World, order: tuple[int, int]) -> None:
    snapshots = []
    for channel in ALL[:2]:
        snapshots.append(world.driver.snapshot("p1"))
        world.driver.set_channel("p1", channel)
    for number in order:
        world.driver.remove_channel("p1", ALL[number].vlan, snapshots[number])
    state = world.driver.read()
    assert (state.fail_mode, state.flows, state.other_flows) == ("standalone", 0, 1)


def test_guest_that_ends_after_the_hairpin_leaves_the_bridge_as_it_was(world: World) -> None:
    before = world.driver.snapshot("p1")
    world.driver.set_hairpin("p1", on=True)
    before_guest = world.driver.snapshot("p1")
    world.driver.set_channel("p1", ALL[0])
    world.driver.restore("p1", before)
    assert (port(world).channels, port(world).hairpin) == (ALL[:1], False)
    world.driver.remove_channel("p1", ALL[0].vlan, before_guest)
    state = world.driver.read()
    assert (state.fail_mode, state.flows, state.other_flows) == ("standalone", 0, 1)
    assert "nohype" not in world.daemons.run("ovs-vsctl", "--timeout=5", "get", "bridge", BRIDGE, "external_ids")


def test_lost_or_changed_translation_is_found(world: World, channels: str) -> None:
    needs = PortNeeds(relay=False, channels=ALL, known=ALL)
    world.driver.set_channel("p1", PortChannel(1001, B, 200))
    assert failed_with(world, needs) == {"channels"}
    world.driver.remove_channel("p1", 1001, channels)
    assert failed_with(world, needs) == {"channels"}
    assert failed_with(world, PortNeeds(relay=False, channels=ALL[:1], known=ALL[:1])) == {"channels"}, "one of no guest"
    world.daemons.kill_vswitchd()
    world.daemons.start_vswitchd()
    assert failed_with(world, needs) >= {"channels", "flows"}
    world.driver.remove_channel("p1", 1000, channels)
    assert world.driver.read().fail_mode == "standalone", "nothing would pass with the flows lost and fail-mode secure"


def failed_with(world: World, needs: PortNeeds) -> set[str]:
    checks = check_ports("sw1", world.driver.read(["p1"]), {"p1": 1500}, None, {"p1": needs})
    return {check.name for check in checks if check.verdict is Verdict.FAIL}
