"""Guests of the edge mode channel: the NIC stays as it is, and the VLANs of the VFs keep it from switching."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.audit.facts import read_edges
from orchestrator.audit.uplink import prove_vepa
from orchestrator.guests.service import GuestService
from orchestrator.host.edge import read_edge_mode
from orchestrator.host.sriov import read_pfs
from orchestrator.host.survey import read_topology
from orchestrator.model.access import OPERATOR
from orchestrator.model.edge import EdgeMode
from orchestrator.model.network import NetworkRequest, parse_vlans
from orchestrator.model.proof import Verdict
from orchestrator.model.uplink import EdgeReading, VepaReadings
from tests.harness.audit_data import GUEST1, GUEST2
from tests.harness.crash import World
from tests.harness.guests import create, kinds, open_manager


@pytest.fixture
def manager(world: World) -> GuestService:
    policy = replace(world.server.policy, edges=(("nic0", EdgeMode.CHANNEL),), channels={"nic0": parse_vlans("1000-1001")})
    return open_manager(world, policy)


def read_edge(world: World, *vfs: object) -> EdgeReading:
    guests = [replace(guest, hostdevs=(vf,)) for guest, vf in zip((GUEST1, GUEST2), vfs, strict=True)]
    (edge,) = read_edges(world.host, guests, read_topology(world.host))
    return edge


def test_guests_get_vlans_and_the_pf_stays_as_it_is(world: World, manager: GuestService) -> None:
    one, two = create(manager), create(manager, name="two")
    assert [(plan.vf.edge, plan.vf.vlan) for plan in (one, two)] == [(EdgeMode.CHANNEL, 1000), (EdgeMode.CHANNEL, 1001)]
    assert [world.host.fake_net.vfs("nic0")[plan.vfs[0].index].vlan for plan in (one, two)] == [1000, 1001]
    pf = next(pf for pf in read_pfs(world.host) if pf.interface == "nic0")
    assert read_edge_mode(world.host, pf) is EdgeMode.VEB
    manager.reconciler.detect_drift()
    manager.reconciler.on_link_change()
    assert "drifted" not in kinds(manager)
    assert read_edge_mode(world.host, pf) is EdgeMode.VEB
    uplink = manager.uplink(OPERATOR, "nic0")
    assert (uplink.edge, sorted(uplink.guests)) == (EdgeMode.CHANNEL, ["two", "web"])
    # nic1 has VEPA mode.
    vepa = create(manager, name="three", nics=[{"uplink": "nic1"}])
    assert (vepa.vf.edge, vepa.vf.vlan) == (EdgeMode.VEPA, 0)
    for name in ("web", "two", "three"):
        manager.delete(OPERATOR, name)
    assert {vf.vlan for vf in world.host.fake_net.vfs("nic0")} <= {0}
    assert world.host.violations() == []


def test_changed_vlan_is_found_by_drift_and_audit(world: World, manager: GuestService) -> None:
    one, two = create(manager), create(manager, name="two")
    addresses = [plan.vfs[0].address for plan in (one, two)]
    edge = read_edge(world, *addresses)
    assert edge.mode == "channel"
    assert "VF 0 has port VLAN 1000, VF 1 has port VLAN 1001, each for itself" in edge.text
    proof = prove_vepa(VepaReadings((edge,), None), None)
    assert (proof.verdict, proof.evidence[-1]) == (Verdict.NOT_MEASURED, edge.text)
    manager.close()
    for vlan in (0, 1000):
        world.host.fake_net.drivers.clear()
        _set_vlan(world, two.vfs[0].index, vlan)
        edge = read_edge(world, *addresses)
        assert edge.mode == "veb", "with one VLAN, or none, the NIC switches between them"
        assert prove_vepa(VepaReadings((edge,), None), None).verdict is Verdict.FAIL


def test_free_vf_in_the_vlan_of_a_guest_fails_the_proof(world: World, manager: GuestService) -> None:
    (vf,) = create(manager).vfs
    _set_vlan(world, vf.index + 5, 1000)
    edges = read_edges(world.host, [replace(GUEST1, hostdevs=(vf.address,))], read_topology(world.host))
    assert [edge.mode for edge in edges] == ["veb"]


def _set_vlan(world: World, index: int, vlan: int) -> None:
    """Another program; the fake host counts it as a violation while a guest has the VF."""
    world.host.fake_net.set_vf("nic0", index, vlan=vlan)


def test_guest_does_not_enter_a_network_that_was_there_before_the_mode_was_changed(world: World) -> None:
    manager = open_manager(world, replace(world.server.policy, uplinks=("nic0",)))
    manager.networks.create(OPERATOR, NetworkRequest(name="blue", vlan=1000))
    member = create(manager, nics=[{"network": "blue"}])
    manager.close()
    policy = replace(world.server.policy, edges=(("nic0", EdgeMode.CHANNEL),), channels={"nic0": parse_vlans("1000-1001")})
    other = create(open_manager(world, policy), name="two")
    assert (member.vf.pf, member.vf.vlan) == (other.vf.pf, 1000)
    assert other.vf.vlan == 1001, "the NIC would switch between them"
