"""Guests of the edge mode channel: the VLANs of the VFs keep the NIC from switching, and VEPA mode where it has that."""

from __future__ import annotations

from dataclasses import replace
from errno import EINVAL

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
from tests.fakes.root import DEVICES, LOOPBACK
from tests.harness.audit_data import GUEST1, GUEST2
from tests.harness.crash import World
from tests.harness.guests import create, kinds, open_manager, state, warned

PF = f"{DEVICES}/0000:10:00.0"
RESOURCE, DTXSWC = f"{PF}/resource0", 0x3500


@pytest.fixture
def manager(world: World) -> GuestService:
    policy = replace(world.server.policy, edges=(("nic0", EdgeMode.CHANNEL),), channels={"nic0": parse_vlans("1000-1001")})
    return open_manager(world, policy)


def use_old_nic(world: World) -> None:
    """nic0 is a NIC whose driver is not known to support VEPA."""
    world.host.add(f"{PF}/vendor", "0x14e4")
    world.host.add(f"{PF}/device", "0x16af")


def switch_locally(world: World) -> None:
    world.host.registers[world.host.real(RESOURCE), DTXSWC] |= LOOPBACK


def read_mode(world: World) -> EdgeMode | None:
    return read_edge_mode(world.host, next(pf for pf in read_pfs(world.host) if pf.interface == "nic0"))


def read_edge(world: World, *vfs: object) -> EdgeReading:
    guests = [replace(guest, hostdevs=(vf,)) for guest, vf in zip((GUEST1, GUEST2), vfs, strict=True)]
    (edge,) = read_edges(world.host, guests, read_topology(world.host))
    return edge


def test_guests_get_vlans_and_a_pf_without_vepa_stays_as_it_is(world: World, manager: GuestService) -> None:
    use_old_nic(world)
    one, two = create(manager), create(manager, name="two")
    assert [(plan.vf.edge, plan.vf.vlan) for plan in (one, two)] == [(EdgeMode.CHANNEL, 1000), (EdgeMode.CHANNEL, 1001)]
    assert [world.host.fake_net.vfs("nic0")[plan.vfs[0].index].vlan for plan in (one, two)] == [1000, 1001]
    manager.reconciler.detect_drift()
    manager.reconciler.on_link_change()
    assert "drifted" not in kinds(manager)
    assert not any("switching between its VFs" in text for text in warned(manager))
    assert {pf.interface: read_edge_mode(world.host, pf) for pf in read_pfs(world.host)}["nic0"] is None
    uplink = manager.uplink(OPERATOR, "nic0")
    assert (uplink.edge, sorted(uplink.guests)) == (EdgeMode.CHANNEL, ["two", "web"])
    # nic1 has VEPA mode.
    vepa = create(manager, name="three", nics=[{"uplink": "nic1"}])
    assert (vepa.vf.edge, vepa.vf.vlan) == (EdgeMode.VEPA, 0)
    for name in ("web", "two", "three"):
        manager.delete(OPERATOR, name)
    assert {vf.vlan for vf in world.host.fake_net.vfs("nic0")} <= {0}
    assert world.host.violations() == []


def test_nic_that_has_vepa_mode_gets_it_too(world: World, manager: GuestService) -> None:
    """While they switch locally, X550 and QEMU's 82576 take a frame to another VF as local without comparing its VLAN."""
    create(manager)
    assert read_mode(world) is EdgeMode.VEPA
    switch_locally(world)  # as a reset of the PF does
    manager.reconciler.on_link_change()
    assert read_mode(world) is EdgeMode.VEPA
    manager.delete(OPERATOR, "web")
    assert world.host.violations() == []


def test_guest_starts_if_the_register_is_not_accessible(world: World, manager: GuestService) -> None:
    create(manager)
    world.host.read_errors[RESOURCE] = EINVAL
    plan = create(manager, name="two")
    (text,) = [text for text in warned(manager) if "switching between its VFs" in text]
    assert f"cannot stop PF {plan.vf.pf} from switching between its VFs" in text
    assert "it may drop frames to VFs in other VLANs" in text
    manager.reconciler.on_link_change()
    assert state(manager, "two") == "running"


def test_changed_vlan_is_found_by_drift_and_audit(world: World, manager: GuestService) -> None:
    one, two = create(manager), create(manager, name="two")
    switch_locally(world)
    addresses = [plan.vfs[0].address for plan in (one, two)]
    edge = read_edge(world, *addresses)
    assert edge.mode == "channel"
    assert "VF 0 has port VLAN 1000, VF 1 has port VLAN 1001, each for itself" in edge.text
    assert "it may take frames to a VF in another VLAN as local, and drop them" in edge.text
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
    switch_locally(world)
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
