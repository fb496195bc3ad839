"""Guests of the edge mode nft-vepa. What it shares with macvtap-vepa is in test_software_edge.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import HostError
from orchestrator.guests.service import GuestService
from orchestrator.host.root import Chain
from orchestrator.model.access import OPERATOR
from orchestrator.model.edge import EdgeMode
from tests.harness.crash import World
from tests.harness.guests import create, kinds, open_manager
from tests.service.guests.test_software_edge import ACCEPT, details, kill_and_restart, left_over

EDGES = (("nic0", EdgeMode.NFT_VEPA), ("nic1", EdgeMode.NFT_VEPA))


@pytest.fixture
def manager(world: World) -> GuestService:
    return open_manager(world, replace(world.server.policy, edges=EDGES))


def is_promiscuous(world: World, uplink: str) -> bool:
    (link,) = [link for link in world.host.net.read_links() if link.name == uplink]
    return link.promiscuous


def test_guest_runs_and_leaves_nothing(world: World, manager: GuestService) -> None:
    (nic,) = create(manager, **ACCEPT).nics
    assert (nic.edge, nic.interface, nic.vf) == (EdgeMode.NFT_VEPA, "nic0", None)
    links = {link.name: link for link in world.host.net.read_links()}
    tap = links[nic.tap]
    assert (tap.kind, tap.up, tap.master, links[str(tap.master)].up) == ("tun", True, f"nb{nic.tap[2:]}", False)
    assert is_promiscuous(world, "nic0")
    assert not is_promiscuous(world, "nic1")
    assert [one.interface for one in world.hypervisor.read_guest("web").nics] == [nic.tap]
    create(manager, name="two", nics=[{"uplink": "nic1"}], **ACCEPT)
    assert is_promiscuous(world, "nic1")
    manager.delete(OPERATOR, "two")
    assert is_promiscuous(world, "nic0")
    manager.delete(OPERATOR, "web")
    assert left_over(world) == []
    assert not is_promiscuous(world, "nic0")
    assert not is_promiscuous(world, "nic1")
    assert world.host.violations() == []


def test_uplink_that_was_promiscuous_stays_so(world: World, manager: GuestService) -> None:
    world.host.fake_net.set_promiscuous("nic0", on=True)
    create(manager, **ACCEPT)
    manager.delete(OPERATOR, "web")
    assert is_promiscuous(world, "nic0")


@pytest.mark.parametrize("restore", ["by drift", "at a start"])
def test_reception_that_the_manager_restores_is_undone(world: World, manager: GuestService, restore: str) -> None:
    world.host.fake_net.set_promiscuous("nic0", on=True)
    create(manager, **ACCEPT)
    world.host.fake_net.set_promiscuous("nic0", on=False)  # another program; only now it is the manager that sets it
    if restore == "by drift":
        manager.reconciler.detect_drift()
    else:
        manager.stop(OPERATOR, "web", 0)
        manager.start(OPERATOR, "web")
    assert is_promiscuous(world, "nic0")
    manager.delete(OPERATOR, "web")
    assert not is_promiscuous(world, "nic0")


def test_restarted_manager_adopts_and_cleans_up(world: World, manager: GuestService) -> None:
    create(manager, **ACCEPT)
    manager.close()
    again = open_manager(world, replace(world.server.policy, edges=EDGES))
    world.hypervisor.watch_ends(again.reconciler.on_guest_ended)
    again.reconciler.detect_drift()
    assert "drifted" not in kinds(again)
    again.delete(OPERATOR, "web")
    assert left_over(world) == []
    assert not is_promiscuous(world, "nic0")


def flush_rules(world: World, tap: str) -> None:
    world.host.fake_net.delete_table(f"nohype-{tap}")


def open_rules(world: World, tap: str) -> None:
    world.host.fake_net.replace_table(f"nohype-{tap}", Chain("from-guest", "ingress", tap, []))


def leave_bridge(world: World, tap: str) -> None:
    world.host.fake_net.change_tap(tap, master=None)


def set_bridge_up(world: World, tap: str) -> None:
    world.host.fake_net.change_tap(f"nb{tap[2:]}", up=True)


def stop_reception(world: World, _tap: str) -> None:
    world.host.fake_net.set_promiscuous("nic0", on=False)


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (flush_rules, "missing or were changed"),
        (open_rules, "missing or were changed"),
        (leave_bridge, "bridge is none, expected nb-"),
        (set_bridge_up, "state is up, expected down"),
        (stop_reception, "nic0: promiscuous mode is off, expected on"),
    ],
)
def test_changed_edge_is_reported_and_restored(world: World, manager: GuestService, spoil: object, finding: str) -> None:
    tap = create(manager, **ACCEPT).vf.tap
    manager.reconciler.detect_drift()
    assert "drifted" not in kinds(manager)
    spoil(world, tap)  # type: ignore[operator]
    manager.reconciler.detect_drift()
    (detail,) = details(manager, "drifted")
    assert finding in detail
    assert "(restored)" in detail
    manager.reconciler.detect_drift()
    assert [detail for detail in details(manager, "drifted") if finding in detail] == [detail]


def test_uplink_with_a_macvtap_of_another_program_is_refused(world: World, manager: GuestService) -> None:
    world.host.fake_net.create_macvtap("mv0", "nic0", create(manager, nics=[{"uplink": "nic1"}], **ACCEPT).vf.mac)
    with pytest.raises(HostError, match=r"the uplink carries mv0 \(macvtap\)") as caught:
        create(manager, name="no", **ACCEPT)
    assert "macvtap-vepa" in caught.value.hint
    assert [guest.plan.name for guest in manager.guests(OPERATOR)] == ["web"]


def test_stopped_guest_has_no_tap_and_gets_the_same_one_again(world: World, manager: GuestService) -> None:
    plan = create(manager, **ACCEPT)
    manager.stop(OPERATOR, "web", 5)
    assert left_over(world) == []
    world.host.fake_net.set_promiscuous("nic0", on=False)  # another program
    manager.start(OPERATOR, "web")
    assert [one.interface for one in world.hypervisor.read_guest("web").nics] == [plan.vf.tap]
    assert world.host.violations() == []


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("change", ["promiscuous nic0", "tap nh-", "table nohype-nh-", "hypervisor start"])
def test_killed_manager_cleans_up_after_its_start(world: World, manager: GuestService, moment: str, change: str) -> None:
    again = kill_and_restart(world, manager, moment, change)
    assert (again.guests(OPERATOR), left_over(world), is_promiscuous(world, "nic0")) == ((), [], False)
    assert world.host.violations() == []
