"""Guests with several NICs: each VF is created, configured, passed through, watched and cleaned up."""

from __future__ import annotations

import pytest

from orchestrator.errors import Conflict, GuestError, NoRoom, QuotaExceeded
from orchestrator.guests.service import GuestService
from orchestrator.host.pci import VFIO, read_driver
from orchestrator.host.sriov import read_numvfs
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR, Identity, Quota, Role
from orchestrator.model.plan import Plan
from orchestrator.model.topology import VfState
from tests.fakes.root import DEVICES
from tests.fakes.server import IMAGE
from tests.harness.crash import World
from tests.harness.guests import ask, create, open_manager, state

BOTH = [{"uplink": "nic0", "address": "10.9.0.11/24"}, {"uplink": "nic1"}]


def drivers(world: World, plan: Plan) -> list[str | None]:
    return [read_driver(world.host, nic.address) for nic in plan.nics]


def settings(world: World, plan: Plan) -> list[VfState]:
    return [world.host.fake_net.vfs(nic.interface)[nic.index] for nic in plan.nics]


def test_guest_owns_vfs_of_two_uplinks_until_it_is_deleted(world: World, manager: GuestService, ledger: Ledger) -> None:
    before = world.host.tree()
    plan = create(manager, nics=BOTH)
    assert [nic.interface for nic in plan.nics] == ["nic0", "nic1"]
    assert plan.cmdline == "nohype.address=10.9.0.11/24"
    assert drivers(world, plan) == [VFIO, VFIO]
    assert settings(world, plan) == [VfState(nic.index, nic.mac) for nic in plan.nics]
    assert world.hypervisor.read_guest("web").hostdevs == tuple(nic.address for nic in plan.nics)
    assert world.host.violations() == []
    manager.stop(OPERATOR, "web", 0)
    assert drivers(world, plan) == [None, None]
    assert settings(world, plan) == [VfState(nic.index) for nic in plan.nics]
    manager.start(OPERATOR, "web")
    assert manager.delete(OPERATOR, "web") is None
    assert (ledger.read().claims, ledger.undo_records("web"), ledger.undo_records("host")) == ((), (), ())
    assert [read_numvfs(world.host, nic.pf) for nic in plan.nics] == [0, 0]
    assert world.host.tree() == before


def test_no_other_guest_gets_one_of_its_vfs(world: World, manager: GuestService) -> None:
    first = create(manager, nics=[{}, {}])
    second = create(manager, name="other", nics=[{}, {}])
    vfs = [nic.address for plan in (first, second) for nic in plan.nics]
    assert len(set(vfs)) == 4
    assert len({nic.mac for plan in (first, second) for nic in plan.nics}) == 4
    wanted = {"nics": [{"vf": str(first.nics[1].address)}]}
    with pytest.raises(NoRoom, match=f"VF {first.nics[1].address} is owned by a guest"):
        ask(manager, **wanted)


def test_manager_that_starts_keeps_the_guest_with_all_its_nics(world: World, manager: GuestService, ledger: Ledger) -> None:
    plan = create(manager, nics=BOTH)
    world.hypervisor.watch_ends(lambda _uuid, _cause: None)
    ledger.close()
    manager = open_manager(world)
    assert manager.guest(OPERATOR, "web").plan == plan
    assert state(manager) == "running"
    manager.reconciler.detect_drift()
    assert "drifted" not in [event.kind for event in manager.events(OPERATOR)]
    manager.delete(OPERATOR, "web")
    assert drivers(world, plan) == [None, None]


def test_drift_of_the_second_nic_is_reported(world: World, manager: GuestService) -> None:
    _, nic = create(manager, nics=BOTH).nics
    world.host.fake_net.set_vf(nic.interface, nic.index, vlan=7)
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()
    assert [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"] == [
        f"VF {nic.address}: vlan is 7, expected 0"
    ]


def test_guest_whose_second_vf_cannot_be_reset_is_quarantined_with_both(world: World, manager: GuestService) -> None:
    plan = create(manager, nics=BOTH)
    (world.host.path / DEVICES / str(plan.nics[1].address) / "reset").unlink()
    with pytest.raises(Conflict, match=f"VF {plan.nics[1].address} cannot be reset"):
        manager.delete(OPERATOR, "web")
    other = create(manager, name="other", nics=BOTH)
    assert not {nic.address for nic in plan.nics} & {nic.address for nic in other.nics}


def test_failed_launch_releases_the_vfs_that_were_configured(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = world.host.tree()

    def fail(_xml: str) -> None:
        raise GuestError("no")

    monkeypatch.setattr(world.hypervisor, "create_paused", fail)
    with pytest.raises(GuestError, match="no"):
        create(manager, nics=BOTH)
    assert ledger.read().claims == ()
    assert world.host.tree() == before


def test_quota_counts_every_vf(manager: GuestService) -> None:
    tenant = Identity("acme", Role.TENANT, "acme", quota=Quota(vfs=3))
    ask(manager, tenant, nics=[{}, {}, {}])
    with pytest.raises(QuotaExceeded, match="4 of 3 VFs"):
        ask(manager, tenant, nics=[{}, {}, {}, {}])


def test_image_that_was_built_anew_is_not_booted(world: World, manager: GuestService) -> None:
    """A stopped guest owns the build that it was created with."""
    create(manager)
    manager.stop(OPERATOR, "web", 0)
    file = world.folder / "images" / IMAGE / "image.json"
    built = file.read_text()
    file.write_text(built.replace('"hash": "', '"hash": "f00'))
    with pytest.raises(Conflict, match="image minimal has changed since the guest was created: build f00"):
        manager.start(OPERATOR, "web")
    assert state(manager) == "stopped"
    file.write_text(built)
    manager.start(OPERATOR, "web")
    assert state(manager) == "running"
