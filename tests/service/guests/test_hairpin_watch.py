"""Frames that no longer return from the switch are one event, and another when they return; nothing else is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.errors import HostError
from orchestrator.guests.hairpin_watch import HairpinWatch
from orchestrator.guests.service import GuestService
from orchestrator.host.edge.returns import is_counting
from orchestrator.host.root import Chain
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.network import NetworkRequest
from orchestrator.model.plan import Plan
from orchestrator.model.uplink import HairpinResult
from tests.fakes.root import DEVICES
from tests.harness.crash import World
from tests.harness.guests import create, state, warned

KINDS = ("hairpin-lost", "hairpin-returned")


@pytest.fixture
def watch(world: World, opened: tuple[GuestService, Ledger], monkeypatch: pytest.MonkeyPatch) -> HairpinWatch:
    monkeypatch.setattr("orchestrator.guests.hairpin_watch.PAUSE_SECONDS", 0.0)
    return HairpinWatch(world.host, opened[1])


@pytest.fixture
def software(world: World, manager: GuestService) -> str:
    """A guest on a software edge; its tap."""
    for address in ("0000:10:00.0", "0000:14:00.0"):
        (world.host.path / DEVICES / address / "sriov_totalvfs").unlink()
    (nic,) = create(manager, accept=["software-edge"]).nics
    world.host.fake_net.probes.clear()
    return nic.tap


def events(manager: GuestService) -> list[str]:
    return [event.kind for event in manager.events(OPERATOR) if event.kind in KINDS]


def test_without_guests_nothing_is_probed(world: World, watch: HairpinWatch, manager: GuestService) -> None:
    assert not watch.check()
    plan = create(manager)
    manager.stop(OPERATOR, plan.name, 0)
    assert not watch.check()
    assert world.host.fake_net.probes == []


def test_loss_and_return_are_one_event_each(world: World, watch: HairpinWatch, manager: GuestService) -> None:
    create(manager)
    create(manager, name="db")
    assert watch.check()
    assert events(manager) == []
    world.host.fake_net.hairpin = False
    for _ in range(3):
        watch.check()
    assert events(manager) == ["hairpin-lost"]
    (lost,) = (event for event in manager.events(OPERATOR) if event.kind == "hairpin-lost")
    assert lost.subject == "host"
    assert lost.detail.startswith("uplink nic0: frames between guests do not return from the switch; guests: db, web; ")
    world.host.fake_net.hairpin = True
    for _ in range(3):
        watch.check()
    assert events(manager) == ["hairpin-lost", "hairpin-returned"]


def test_port_that_carries_only_networks_is_no_alarm(world: World, watch: HairpinWatch, manager: GuestService) -> None:
    """The probe is untagged. A port that has returned it before carries untagged frames."""
    manager.networks.create(OPERATOR, NetworkRequest(name="blue", vlan=100))
    create(manager, nics=[{"network": "blue"}])
    world.host.fake_net.hairpin = False
    assert watch.check()
    assert (events(manager), watch.find_lost()) == ([], {})
    world.host.fake_net.hairpin = True
    watch.check()
    assert (events(manager), watch.find_lost()) == ([], {"nic0": False})
    world.host.fake_net.hairpin = False
    watch.check()
    assert (events(manager), watch.find_lost()) == (["hairpin-lost"], {"nic0": True})


def test_guests_on_software_edges_are_watched_too(
    world: World, watch: HairpinWatch, software: str, manager: GuestService
) -> None:
    assert software
    world.host.fake_net.hairpin = False
    watch.check()
    assert events(manager) == ["hairpin-lost"]


def count(world: World, *readings: tuple[int, int]) -> None:
    """What the rules on the uplink have counted, reading by reading; the last one stays."""
    left = list(readings)

    def read(table: str) -> dict[str, int]:
        assert table == "nohype-returns-nic0"
        now = left.pop(0) if len(left) > 1 else left[0]
        return dict(zip(("must-return", "returned"), now, strict=True))

    world.host.fake_net.count_packets = read  # type: ignore[method-assign]


def test_guests_frames_that_do_not_return_are_one_event_although_those_of_the_host_do(
    world: World, watch: HairpinWatch, software: str, manager: GuestService
) -> None:
    count(world, (5, 5), (45, 9), (47, 9), (70, 9), (90, 9))
    watch.check()
    watch.check()
    assert (events(manager), watch.find_lost()) == (["hairpin-lost"], {"nic0": True})
    (lost,) = (event for event in manager.events(OPERATOR) if event.kind == "hairpin-lost")
    assert lost.detail.startswith("uplink nic0: 42 frames between guests left, 4 of them returned from the switch; guests: web; ")
    watch.check()
    for returns in (False, True):  # as seen by the probe
        world.host.fake_net.hairpin = returns
        watch.check()
        assert events(manager) == ["hairpin-lost"]
    count(world, (91, 10))
    watch.check()
    assert (events(manager), watch.find_lost()) == (["hairpin-lost", "hairpin-returned"], {"nic0": False})
    assert watch.find_counts()["nic0"].must_return == 91


@pytest.mark.parametrize(
    "readings",
    [
        pytest.param([(0, 0), (1000, 500)], id="half of a flood is dropped"),
        pytest.param([(0, 0), (9, 0)], id="few frames"),
        pytest.param([(0, 0), (40, 0), (41, 1)], id="they return again"),
        pytest.param([(0, 0), (40, 0), (40, 0)], id="the guests are silent again"),
        pytest.param([(90, 90), (20, 0), (30, 0)], id="counted from zero, for other guests"),
        pytest.param([(0, 0), (50, 50), (100, 100)], id="all return"),
    ],
)
def test_other_counts_are_no_alarm(
    world: World, watch: HairpinWatch, software: str, manager: GuestService, readings: list[tuple[int, int]]
) -> None:
    count(world, *readings)
    watch.check()
    watch.check()
    assert (events(manager), watch.find_lost()) == ([], {"nic0": False})


def test_uplinks_are_judged_at_the_same_time(world: World, watch: HairpinWatch, software: str, manager: GuestService) -> None:
    """Guests whose frames are dropped in part must not delay the probes of the other uplinks."""
    create(manager, name="db", nics=[{"uplink": "nic1"}], accept=["software-edge"])
    together = threading.Barrier(2, timeout=60)
    readings = {f"nohype-returns-{uplink}": [(0, 0), (100, 1), (200, 2)] for uplink in ("nic0", "nic1")}

    def read(table: str) -> dict[str, int]:
        if len(readings[table]) == 1:  # the second look of a suspicion
            together.wait()
        return dict(zip(("must-return", "returned"), readings[table].pop(0), strict=True))

    world.host.fake_net.count_packets = read  # type: ignore[method-assign]
    watch.check()
    watch.check()
    assert set(map(len, readings.values())) == {0}
    assert (events(manager), watch.find_lost()) == ([], {"nic0": False, "nic1": False})


def test_counters_that_cannot_be_read_are_one_line_of_the_log(
    world: World, watch: HairpinWatch, software: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As without nft: the watch has a round every 5 s."""
    reasons = ["nft: not found", "nft: not found", "timed out", "", "timed out"]

    def read(table: str) -> dict[str, int]:
        assert table == "nohype-returns-nic0"
        if reason := reasons.pop(0):
            raise HostError(reason)
        return {"must-return": 1, "returned": 1}

    world.host.fake_net.count_packets = read  # type: ignore[method-assign]
    for _ in range(5):
        watch.check()
    said = [record.getMessage() for record in caplog.records if "how many frames return" in record.getMessage()]
    assert [text.partition(": ")[2] for text in said] == ["nft: not found", "timed out", "timed out"]


def test_counting_follows_the_guests_and_ends_with_them(world: World, manager: GuestService, software: str) -> None:
    net = world.host.fake_net
    first, second = manager.guest(OPERATOR, "web").plan, create(manager, name="db", accept=["software-edge"])

    def counts(*plans: Plan) -> bool:
        return is_counting(world.host, "nic0", [plan.nics[0].mac for plan in plans])

    assert counts(first, second)
    net.delete_table("nohype-returns-nic0")  # nft flush ruleset
    net.delete_table(f"nohype-{software}")
    manager.reconciler.check_taps()
    assert counts(first, second)
    manager.stop(OPERATOR, "web", 5)
    assert counts(second)
    manager.start(OPERATOR, "web")
    assert counts(first, second)
    net.delete_table("nohype-returns-nic0")
    manager.reconciler.recover()  # as after a start of the manager
    assert counts(first, second)
    net.delete_table("nohype-returns-nic0")
    manager.reconciler.detect_drift()  # every minute
    assert counts(first, second)
    for name in ("web", "db"):
        manager.delete(OPERATOR, name)
    assert net.list_made() == []


def test_guests_run_where_frames_cannot_be_counted(world: World, manager: GuestService) -> None:
    """As without the egress hook, before Linux 5.16."""
    replace_table = world.host.fake_net.replace_table

    def refuse(table: str, *chains: Chain) -> None:
        if "returns" in table:
            raise HostError(f"cannot load table {table} of nftables: Operation not supported")
        replace_table(table, *chains)

    world.host.fake_net.replace_table = refuse  # type: ignore[method-assign]
    for address in ("0000:10:00.0", "0000:14:00.0"):
        (world.host.path / DEVICES / address / "sriov_totalvfs").unlink()
    create(manager, accept=["software-edge"])
    create(manager, name="db", accept=["software-edge"])
    assert state(manager, "db") == "running"
    (text,) = [text for text in warned(manager) if text.startswith("frames between guests are not counted: ")]
    assert "Operation not supported" in text


def test_a_firewall_that_flushes_in_a_loop_is_one_warning(world: World, manager: GuestService, software: str) -> None:
    """Sometimes before the rules are read back, sometimes afterwards."""
    net = world.host.fake_net
    replace_table, table = net.replace_table, "nohype-returns-nic0"

    def reported() -> list[str]:
        return [text.partition(": ")[2] for text in warned(manager) if text.startswith("frames between guests are not counted: ")]

    def flush(name: str, *chains: Chain) -> None:
        replace_table(name, *chains)
        net.delete_table(name)

    for number in range(6):
        net.replace_table = replace_table if number % 2 else flush  # type: ignore[method-assign]
        net.delete_table(table)
        manager.reconciler.check_taps()
    (text,) = reported()
    assert text.startswith("the rules that count frames between guests on nic0 are not as they were set")
    manager.reconciler.check_taps()
    assert sorted(reported()) == sorted([text, "no warnings remain"])


def test_guest_that_starts_and_ends_between_rounds_is_noticed(world: World, watch: HairpinWatch, manager: GuestService) -> None:
    assert not watch.check()
    create(manager)
    assert watch.check()
    assert world.host.fake_net.probes == ["nic0"]
    manager.stop(OPERATOR, "web", 0)
    assert not watch.check()
    manager.start(OPERATOR, "web")
    assert watch.check()
    assert watch.find_lost() == {"nic0": False}


def test_frame_lost_in_a_flood_is_no_alarm(world: World, watch: HairpinWatch, manager: GuestService) -> None:
    create(manager)
    results = iter([0, 0, 1, 0, 1])

    def probe(uplink: str, *, attempts: int, wait: float) -> HairpinResult:
        return HairpinResult(uplink, attempts, next(results))

    world.host.fake_net.probe_hairpin = probe  # type: ignore[assignment]
    watch.check()
    watch.check()
    assert next(results, None) is None
    assert events(manager) == []


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_link_that_is_down_is_no_alarm(world: World, watch: HairpinWatch, manager: GuestService, when: str) -> None:
    """A reset of the PF loses the link for a moment."""
    create(manager)
    world.host.fake_net.hairpin = False
    read_links, calls = world.host.fake_net.read_links, iter(range(100))

    def read() -> object:
        up = when == "meanwhile" and next(calls) % 2 == 0
        return tuple(replace(link, carrier=up) for link in read_links())

    world.host.fake_net.read_links = read  # type: ignore[assignment, method-assign]
    watch.check()
    assert events(manager) == []


def _raise(*_: object, **__: object) -> HairpinResult:
    raise HostError("cannot send a probe frame on nic0")


def test_failed_probe_is_no_alarm(world: World, watch: HairpinWatch, manager: GuestService) -> None:
    create(manager)
    world.host.fake_net.probe_hairpin = _raise  # type: ignore[method-assign]
    assert watch.check()
    assert events(manager) == []


@pytest.mark.parametrize(
    "end", [lambda manager: manager.stop(OPERATOR, "web", 0), lambda manager: manager.delete(OPERATOR, "web")]
)
def test_loss_ends_silently_with_the_last_guest_and_is_reported_again(
    world: World, watch: HairpinWatch, manager: GuestService, end: Callable[[GuestService], object]
) -> None:
    create(manager)
    world.host.fake_net.hairpin = False
    watch.check()
    end(manager)
    watch.check()
    assert events(manager) == ["hairpin-lost"]
    create(manager, name="other")
    watch.check()
    assert events(manager) == ["hairpin-lost", "hairpin-lost"]


def test_losses_of_several_uplinks_are_confirmed_at_the_same_time(
    world: World, watch: HairpinWatch, manager: GuestService
) -> None:
    create(manager, nics=[{"uplink": "nic0"}])
    create(manager, name="db", nics=[{"uplink": "nic1"}])
    together = threading.Barrier(2, timeout=60)

    def probe(uplink: str, *, attempts: int, wait: float) -> HairpinResult:
        if attempts > 1:
            together.wait()
        return HairpinResult(uplink, attempts, 0)

    world.host.fake_net.probe_hairpin = probe  # type: ignore[assignment]
    watch.check()
    assert events(manager) == ["hairpin-lost", "hairpin-lost"]
