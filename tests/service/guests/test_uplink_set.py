"""`nohype uplink set`: the edge mode of new guests, which the ledger keeps."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from orchestrator.errors import Conflict, Forbidden, LedgerError, NotFound
from orchestrator.guests.service import GuestService
from orchestrator.host.link_owner import find_owner
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR, Role
from orchestrator.model.edge import EdgeMode
from orchestrator.model.network import parse_vlans
from tests.harness.crash import World
from tests.harness.guests import create, open_manager
from tests.service.guests.test_software_edge import ACCEPT, details


def test_new_guests_get_the_mode_also_after_a_restart(world: World, manager: GuestService) -> None:
    after = manager.set_uplink(OPERATOR, "nic0", "nft-vepa")
    assert (after.edge, after.configured, after.override) == (EdgeMode.NFT_VEPA, "auto", "nft-vepa")
    assert "edge mode nft-vepa, before as configured" in details(manager, "uplink-set")
    assert create(manager, **ACCEPT).vf.edge is EdgeMode.NFT_VEPA
    manager.close()
    again = open_manager(world)
    assert again.uplink(OPERATOR, "nic0").override == "nft-vepa"
    world.hypervisor.watch_ends(again.reconciler.on_guest_ended)
    again.delete(OPERATOR, "web")
    assert again.set_uplink(OPERATOR, "nic0", "configured").override == ""
    assert create(again).vf.edge is EdgeMode.VEPA
    assert world.host.violations() == []


def test_uplink_with_guests_keeps_its_mode(manager: GuestService) -> None:
    create(manager)
    create(manager, name="two")
    manager.stop(OPERATOR, "two", 5)
    with pytest.raises(Conflict, match="guests use the uplink: two, web") as caught:
        manager.set_uplink(OPERATOR, "nic0", "macvtap-vepa")
    assert "delete these guests" in caught.value.hint
    assert manager.uplink(OPERATOR, "nic0").override == ""
    assert manager.set_uplink(OPERATOR, "nic0", "configured").edge is EdgeMode.VEPA, "nothing changes"
    assert manager.set_uplink(OPERATOR, "nic1", "macvtap-vepa").edge is EdgeMode.MACVTAP_VEPA


def test_impossible_mode_is_refused(world: World, manager: GuestService) -> None:
    with pytest.raises(Conflict, match=r"nic0 cannot have edge mode channel: it has no VLANs for guests"):
        manager.set_uplink(OPERATOR, "nic0", "channel")
    channels = open_manager(world, replace(world.server.policy, channels={"nic0": parse_vlans("1000")}))
    assert channels.set_uplink(OPERATOR, "nic0", "channel").edge is EdgeMode.CHANNEL
    with pytest.raises(NotFound, match="eth9 is not an uplink"):
        manager.set_uplink(OPERATOR, "eth9", "vepa")
    for role in (Role.TENANT, Role.VIEWER):
        with pytest.raises(Forbidden):
            manager.set_uplink(replace(OPERATOR, role=role), "nic0", "vepa")


def test_auto_has_precedence_over_a_configured_mode(world: World) -> None:
    manager = open_manager(world, replace(world.server.policy, edges=(("nic0", EdgeMode.MACVTAP_VEPA),)))
    after = manager.set_uplink(OPERATOR, "nic0", "auto")
    assert (after.edge, after.configured, after.override) == (EdgeMode.VEPA, "macvtap-vepa", "auto")


def test_unknown_mode_in_the_file_is_an_error(world: World, manager: GuestService, ledger: Ledger) -> None:
    manager.set_uplink(OPERATOR, "nic0", "nft-vepa")
    manager.close()
    ledger.close()
    with closing(sqlite3.connect(ledger.path)) as db, db:
        db.execute("UPDATE uplink_edge SET edge = 'x'")
    with pytest.raises(LedgerError, match="unknown edge mode 'x' of uplink nic0"):
        Ledger(ledger.path)


@pytest.mark.parametrize(
    ("file", "text", "owner"),
    [
        ("NetworkManager/devices/{}", "[device]\nmanaged=true\nconnection-uuid=1\n", "NetworkManager"),
        ("NetworkManager/devices/{}", "[device]\nmanaged=false\n", ""),
        ("systemd/netif/links/{}", "ADMIN_STATE=configured\nOPER_STATE=routable\n", "systemd-networkd"),
        ("systemd/netif/links/{}", "ADMIN_STATE=unmanaged\n", ""),
        ("systemd/netif/links/{}", "\0\xff", ""),
    ],
)
def test_program_that_manages_the_uplink_is_shown(world: World, manager: GuestService, file: str, text: str, owner: str) -> None:
    (index,) = [link.index for link in world.host.net.read_links() if link.name == "nic0"]
    world.host.add(f"run/{file.format(index)}", text)
    assert manager.uplink(OPERATOR, "nic0").managed_by == owner
    assert find_owner(world.host, index + 1000) == ""
