"""Frames of guests, uplink and switch port, as `nohype uplink show` and the metrics have them."""

from __future__ import annotations

from orchestrator.guests.counters import read_uplink_counters
from orchestrator.guests.service import GuestService
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.uplink import CounterPlace, CounterReading, FrameCounts
from tests.fakes.root import DEVICES
from tests.harness.crash import World
from tests.harness.guests import create

COUNTS = FrameCounts(5, 4, 500, 400, 0, 0)
PORT = CounterReading(CounterPlace.SWITCH, "swp1", "", COUNTS)


def read(world: World, ledger: Ledger, uplink: str = "nic0") -> dict[tuple[str, str], CounterReading]:
    found = read_uplink_counters(world.host, uplink, ledger.read().claims, lambda _: PORT)
    return {(one.place, one.guest): one for one in found}


def test_frames_of_a_vf_are_not_measured_with_a_driver_that_does_not_count(
    world: World, opened: tuple[GuestService, Ledger]
) -> None:
    manager, ledger = opened
    plan = create(manager)
    world.host.fake_net.counters["nic0"] = COUNTS
    found = read(world, ledger)
    assert found["uplink", ""].counts == COUNTS
    assert found["switch", ""] == PORT
    guest = found["guest", "web"]
    assert (guest.name, guest.counts) == (str(plan.nics[0].address), None)
    assert guest.gap == "not measured: the driver of the PF reports no frames of this VF"
    world.host.fake_net.vf_counters = {plan.nics[0].index or 0: COUNTS}
    assert read(world, ledger)["guest", "web"].counts == COUNTS
    manager.stop(OPERATOR, "web", 0)
    assert read(world, ledger).keys() == {("uplink", ""), ("switch", "")}


def test_frames_of_a_software_edge_are_those_of_its_tap(world: World, opened: tuple[GuestService, Ledger]) -> None:
    manager, ledger = opened
    for address in ("0000:10:00.0", "0000:14:00.0"):
        (world.host.path / DEVICES / address / "sriov_totalvfs").unlink()
    (nic,) = create(manager, accept=["software-edge"]).nics
    world.host.fake_net.counters[nic.tap] = COUNTS
    assert read(world, ledger)["guest", "web"] == CounterReading(CounterPlace.GUEST, nic.tap, "web", COUNTS)


def test_uplink_that_does_not_exist_is_not_measured(world: World, opened: tuple[GuestService, Ledger]) -> None:
    found = read(world, opened[1], "nic9")["uplink", ""]
    assert (found.counts, found.gap) == (None, "not measured: there is no interface of this name")


def test_one_uplink_is_shown_with_its_frames(manager: GuestService) -> None:
    assert [(one.place, one.name) for one in manager.uplink(OPERATOR, "nic0").counters] == [("uplink", "nic0")]
    assert manager.uplinks(OPERATOR)[0].counters == ()
