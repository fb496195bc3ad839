"""The whole life of guests on NICs that differ from the lab's: what was computed, surveyed or stored may be wrong by now."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from errno import EINVAL, EIO
from pathlib import Path

import pytest

from orchestrator.errors import Conflict, HostError, NoRoom
from orchestrator.guests import allocate
from orchestrator.guests.host_setup import HostSetup
from orchestrator.guests.service import GuestService
from orchestrator.host.sriov import find_vf
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR, Identity, Role
from orchestrator.model.request import parse_guest_request
from orchestrator.model.topology import VfState
from orchestrator.values import PciAddress
from tests.fakes.root import DEVICES, GROUPS
from tests.fakes.server import IMAGE, Server
from tests.harness.crash import World
from tests.harness.guests import create, kinds, state

PF = PciAddress.parse("0000:10:00.0")
FOLDER = f"{DEVICES}/{PF}"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """One PF, nic0."""
    return World(tmp_path / "world", Server(cores=8, nodes=1, vfs=7, pages=512))


def on_change(world: World, part: str, then: Callable[[str], None]) -> None:
    """Before each change of the host that has this in it."""

    def watch(moment: str, change: str) -> None:
        if moment == "before" and part in change:
            then(change)

    object.__setattr__(world.host, "watch", watch)


def set_routing(world: World, offset: int, stride: int) -> None:
    world.host.add(f"{FOLDER}/sriov_offset", str(offset))
    world.host.add(f"{FOLDER}/sriov_stride", str(stride))


def change_routing(world: World, before: tuple[int, int], after: tuple[int, int]) -> None:
    """A card whose offset and stride depend on whether there are VFs."""
    set_routing(world, *before)
    on_change(world, "sriov_numvfs = ", lambda change: set_routing(world, *(before if change.endswith("= 0") else after)))


def rename(world: World, old: str, new: str) -> None:
    for folder in (world.host.path / FOLDER / "net", world.host.path / ".state" / "net"):
        (folder / old).rename(folder / new)


def close(world: World, manager: GuestService, ledger: Ledger) -> None:
    """Ends the manager, while guests run."""
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    manager.close()
    ledger.close()


def open_next(world: World, uplink: str) -> GuestService:
    """The next manager, with its configuration."""
    manager, _ = world.open_manager(replace(world.server.policy, uplinks=(uplink,)))
    manager.reconciler.recover()
    return manager


def check_pf_untouched(world: World) -> None:
    """Nothing was ever written to the PF's driver, override or reset."""
    touched = [
        (name, value)
        for name, value in world.host.writes
        if value.strip() == str(PF) or name in (f"{FOLDER}/driver_override", f"{FOLDER}/reset")
    ]
    assert touched == []
    assert world.host.link(f"{FOLDER}/driver") == "igb"
    assert world.host.violations() == []


@pytest.mark.parametrize(
    ("before", "after"),
    [((128, 2), (384, 1)), ((0, 0), (128, 2)), ((0, 2), (128, 2)), ((128, 0), (128, 2)), ((2, 1), (1, 1)), ((384, 4), (128, 2))],
)
def test_vf_is_planned_at_the_address_that_the_kernel_reports(
    world: World, manager: GuestService, before: tuple[int, int], after: tuple[int, int]
) -> None:
    tree = world.host.tree()
    change_routing(world, before, after)
    for index, name in enumerate(("web", "other")):
        plan = create(manager, name=name)
        assert (plan.vf.index, plan.vf.address) == (index, find_vf(world.host, PF, index))
        assert world.hypervisor.read_guest(plan.uuid).hostdevs == (plan.vf.address,)
    manager.stop(OPERATOR, "web", 1)
    manager.start(OPERATOR, "web")
    for name in ("web", "other"):
        manager.delete(OPERATOR, name)
    set_routing(world, 128, 2)
    assert {key: text for key, text in world.host.tree().items() if key in tree and "irq" not in key} == {
        key: text for key, text in tree.items() if "irq" not in key
    }
    check_pf_untouched(world)


def test_a_plan_that_only_a_creation_can_make_is_not_called_no_room(world: World, manager: GuestService) -> None:
    change_routing(world, (0, 0), (128, 2))
    request = parse_guest_request({"name": "asked", "image": IMAGE, "memory": "64M"})
    with pytest.raises(Conflict, match=rf"the addresses of the VFs of nic0 \({PF}\) are unknown until they are created"):
        manager.plan(OPERATOR, request)
    with pytest.raises(NoRoom, match="9 requested"):
        create(manager, cores=9)
    assert world.host.text(f"{FOLDER}/sriov_numvfs") == "0"
    assert not any("sriov_numvfs" in name for name, _ in world.host.writes), "the NIC is not reset for what has no room"
    create(manager)
    assert manager.plan(OPERATOR, request).plan.vf.index == 1


def test_requested_vf_is_found_at_its_kernel_address(world: World, manager: GuestService) -> None:
    change_routing(world, (128, 2), (384, 1))
    create(manager, name="first")
    plan = create(manager, placement={"cpus": "4-5", "vf": str(PF.offset(386))})
    assert plan.vf.index == 2


def test_moved_vf_of_a_stopped_guest_is_reported_with_both_addresses(world: World, manager: GuestService, ledger: Ledger) -> None:
    plan = create(manager)
    manager.stop(OPERATOR, "web", 1)
    world.host.write(f"{FOLDER}/sriov_numvfs", "0")
    set_routing(world, 384, 1)
    with pytest.raises(HostError, match=f"VF 0 of PF {PF} is {PF.offset(384)}, expected {plan.vf.address}") as caught:
        manager.start(OPERATOR, "web")
    assert "delete the guest and create it again" in caught.value.hint
    assert state(manager) == "stopped"
    assert create(manager, name="other").vf.index == 1, "the number is still the first guest's"
    manager.delete(OPERATOR, "web")
    assert create(manager).vf.address == PF.offset(384)
    check_pf_untouched(world)


def rewrite_plan(world: World, change: Callable[[dict[str, object]], None]) -> None:
    """Changes stored plans past the ledger."""
    with sqlite3.connect(world.folder / "ledger.sqlite") as database:
        for name, text in database.execute("SELECT name, plan FROM guest").fetchall():
            plan = json.loads(text)
            change(plan["nics"][0])
            database.execute("UPDATE guest SET plan = ? WHERE name = ?", (json.dumps(plan), name))
            database.execute("UPDATE claim_key SET key = ? WHERE kind = 'vf' AND guest = ?", (plan["nics"][0]["address"], name))


def test_stored_plan_with_the_pf_as_vf_does_not_change_the_pf(world: World, manager: GuestService, ledger: Ledger) -> None:
    """As an earlier version made it where the first VF offset was 0."""
    create(manager)
    manager.stop(OPERATOR, "web", 1)
    close(world, manager, ledger)
    rewrite_plan(world, lambda vf: vf.update(address=str(PF)))
    manager = open_next(world, "nic0")
    with pytest.raises(HostError, match=f"expected {PF}"):
        manager.start(OPERATOR, "web")
    manager.delete(OPERATOR, "web")
    check_pf_untouched(world)


def test_a_renamed_nic_is_found_by_its_address(world: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager)
    neighbour = create(manager, name="neighbour")
    manager.stop(OPERATOR, "web", 1)
    close(world, manager, ledger)
    rename(world, "nic0", "nic0np0")
    manager = open_next(world, "nic0np0")
    manager.start(OPERATOR, "web")
    assert manager.reconciler.has_guest_on("nic0np0"), "its links are watched"
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()
    assert "drifted" not in kinds(manager)
    world.host.fake_net.set_vf("nic0np0", neighbour.vf.index, vlan=7)
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()
    assert kinds(manager).count("drifted") == 1
    for name in ("web", "neighbour"):
        manager.delete(OPERATOR, name)
    assert world.host.text(f"{FOLDER}/sriov_numvfs") == "0"


@pytest.mark.parametrize("old_journal", [False, True])
def test_a_vf_of_a_nic_that_was_renamed_meanwhile_is_cleaned(
    world: World, manager: GuestService, ledger: Ledger, old_journal: bool
) -> None:
    """Undo records of earlier versions name the PF's interface alone."""
    plan = create(manager)
    create(manager, name="neighbour")
    close(world, manager, ledger)
    if old_journal:
        with sqlite3.connect(world.folder / "ledger.sqlite") as database:
            old = {"vf-mac": ("interface", "index", "mac"), "vf-driver": ("address", "driver")}
            for id_, action, text in database.execute("SELECT id, action, arguments FROM undo").fetchall():
                if action in old:
                    kept = {name: json.loads(text)[name] for name in old[action]}
                    database.execute("UPDATE undo SET arguments = ? WHERE id = ?", (json.dumps(kept), id_))
    rename(world, "nic0", "nic0np0")
    manager = open_next(world, "nic0np0")
    manager.delete(OPERATOR, "web")
    assert world.host.fake_net.vfs("nic0np0")[plan.vf.index] == VfState(plan.vf.index)
    assert world.host.link(f"{DEVICES}/{plan.vf.address}/driver") is None
    assert manager.quarantined(OPERATOR) == ()


def test_a_pf_that_is_out_of_reach_leaves_its_vf_in_quarantine(world: World, manager: GuestService) -> None:
    """Moved to another network namespace: that it is not found does not make it clean. Back again, it can be cleared."""
    plan = create(manager)
    create(manager, name="neighbour")
    folder = world.host.path / FOLDER / "net" / "nic0"
    folder.rename(world.host.path / "elsewhere")
    manager.reconciler.on_link_change()
    manager.reconciler.detect_drift()
    (drifted, _) = [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"]
    assert "0000:10:00.0 has no network interface: it is in another network namespace" in drifted
    with pytest.raises(Conflict, match="it is in another network namespace"):
        manager.delete(OPERATOR, "web")
    assert [one.name for one in manager.quarantined(OPERATOR)] == ["web"]
    (world.host.path / "elsewhere").rename(folder)
    manager.clear_quarantine(OPERATOR, "web")
    assert world.host.fake_net.vfs("nic0")[plan.vf.index] == VfState(plan.vf.index)


def test_vfs_that_were_made_anew_need_no_cleaning(world: World, manager: GuestService) -> None:
    """The kernel itself says that the VF is gone."""
    plan = create(manager)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web")
    world.host.write(f"{DEVICES}/{plan.vf.address}/enable", "0")
    world.host.write(f"{FOLDER}/sriov_numvfs", "0")
    manager.delete(OPERATOR, "web")
    assert manager.quarantined(OPERATOR) == ()


def test_a_driver_that_takes_no_zeros_fills_no_quarantine(world: World, manager: GuestService) -> None:
    world.host.fake_net.drivers["nic0"] = lambda name, value: EINVAL if name == "mac" and value is None else {}
    create(manager, name="neighbour")
    for number in range(3):
        plan = create(manager, name=f"guest{number}")
        assert plan.vf.index == 1
        manager.delete(OPERATOR, f"guest{number}")
        mac = world.host.fake_net.vfs("nic0")[1].mac
        assert mac
        assert not mac.text.startswith("02:4e:48")
    said = [event.detail for event in manager.events(OPERATOR) if event.kind == "not-restored"]
    assert len(said) == 1, "later guests' VF had an address, which was put back"
    assert "VF 1 of nic0 has the random address" in said[0]
    assert manager.quarantined(OPERATOR) == ()
    tenant = Identity("customer", Role.TENANT, "customer")
    assert "not-restored" not in [event.kind for event in manager.events(tenant)]


def test_settings_of_a_vf_before_the_guest_are_restored(world: World, manager: GuestService) -> None:
    create(manager, name="neighbour")
    was = VfState(1, vlan=77, max_rate=100, spoof_check=False, trust=True)
    world.host.fake_net.set_vf("nic0", 1, vlan=77, max_rate=100, spoof_check=False, trust=True)
    plan = create(manager)
    assert world.host.fake_net.vfs("nic0")[1] == VfState(1, plan.vf.mac)
    manager.delete(OPERATOR, "web")
    assert world.host.fake_net.vfs("nic0")[1] == was


def use_by_host(world: World, address: PciAddress, name: str = "ens1v0") -> None:
    """The host's administrator gives a VF to the host's own driver, and sets its interface up."""
    folder = world.host.real(f"{DEVICES}/{address}")
    for file in ("bind", "unbind"):
        world.host.add(f"sys/bus/pci/drivers/igbvf/{file}")
    world.host.add_link(f"{folder}/driver", "../../../bus/pci/drivers/igbvf")
    for file, text in (("address", "02:00:00:00:00:01"), ("operstate", "up"), ("carrier", "1"), ("flags", "0x1003")):
        world.host.add(f"{folder}/net/{name}/{file}", text)


def test_a_vf_that_the_host_has_taken_since_the_survey_is_left_to_it(world: World, manager: GuestService) -> None:
    plan = create(manager, name="neighbour")
    use_by_host(world, PF.offset(130))
    assert create(manager).vf.index == 2
    manager.stop(OPERATOR, "neighbour", 1)
    use_by_host(world, plan.vf.address)
    with pytest.raises(Conflict, match=f"the host uses VF {plan.vf.address}: its interface ens1v0 is up"):
        manager.start(OPERATOR, "neighbour")
    assert world.host.link(f"{DEVICES}/{plan.vf.address}/driver") == "igbvf"
    for name in ("web", "neighbour"):
        manager.delete(OPERATOR, name)
    assert "undo-failed" in kinds(manager), "VFs that the host uses are not removed"
    assert world.host.text(f"{FOLDER}/sriov_numvfs") == "7"


def test_vfs_that_were_made_for_nothing_are_removed(world: World, manager: GuestService) -> None:
    """All of them are in one IOMMU group, which shows only once they are there."""

    before = world.host.tree()
    make = HostSetup.create_vfs

    def make_shared(self: HostSetup, address: PciAddress, interface: str) -> tuple[str, ...]:
        made = make(self, address, interface)
        world.host.read_errors[f"{GROUPS}/1/type"] = EIO  # odd, but stops nothing
        for vf in range(7):
            group = world.host.real(f"{DEVICES}/{PF.offset(128 + 2 * vf)}/iommu_group")
            world.host.add_link(f"{group}/devices/{PF}", f"../../../../devices/pci0000:10/{PF}")
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostSetup, "create_vfs", make_shared)
        patch.setattr("tests.fakes.root.remove_vf", lambda fake, pf, index: None)
        with pytest.raises(NoRoom, match=f"shares IOMMU group 1 with {PF}"):
            create(manager)
    assert world.host.text(f"{FOLDER}/sriov_numvfs") == before[f"{world.host.real(FOLDER)}/sriov_numvfs"] == "0"
    assert world.count_undo_records() == 0


def test_vfs_that_are_removed_while_a_guest_is_placed_are_made_again(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last guest's end may come between making them and the claim."""
    make, left = HostSetup.create_vfs, [2]

    def make_and_lose(self: HostSetup, address: PciAddress, interface: str) -> tuple[str, ...]:
        made = make(self, address, interface)
        if left[0]:
            left[0] -= 1
            self.release()
        return made

    monkeypatch.setattr(HostSetup, "create_vfs", make_and_lose)
    create(manager)
    left[0] = 9
    manager.delete(OPERATOR, "web")
    with pytest.raises(HostError, match="were removed 3 times before"):
        create(manager)
    assert world.count_undo_records() == 0


def test_a_pf_in_switchdev_mode_is_refused_once_that_shows(world: World, manager: GuestService) -> None:
    """Representors come with the VFs."""

    def represent(change: str) -> None:
        for index in range(7):
            folder = f"{FOLDER}/net/eth{index}"
            for file, text in (("phys_port_name", f"pf0vf{index}"), ("address", "5a:00:00:00:00:01"), ("operstate", "up")):
                if not change.endswith("= 0"):
                    world.host.add(f"{folder}/{file}", text)

    on_change(world, "sriov_numvfs = ", represent)
    with pytest.raises(NoRoom, match="is in switchdev mode, but VEPA requires legacy mode"):
        create(manager)
    assert world.host.text(f"{FOLDER}/sriov_numvfs") == "0"
    check_pf_untouched(world)


def test_odd_things_beside_the_uplink_stop_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "two", Server(cores=8, nodes=2, vfs=7, pages=512))
    other = f"{DEVICES}/0000:14:00.0"
    world.host.add(f"{other}/net/nic1/address", "00:00:00:00:00:00")
    world.host.add("sys/kernel/iommu_groups/90/type", "DMA")
    world.host.add("sys/kernel/iommu_groups/90/devices", "no folder")
    world.host.read_errors[f"{other}/sriov_stride"] = EIO
    manager, _ = world.open_manager(replace(world.server.policy, uplinks=("nic0",)))
    assert create(manager).vf.pf == PF
    odd = manager.survey()
    assert "sriov_stride" in odd.pfs[1].fault
    assert [group.number for group in odd.iommu_groups if group.fault] == [90]


@pytest.mark.parametrize("operstate", ["unknown", "dormant"])
def test_a_port_that_does_not_tell_its_state_serves_guests(world: World, manager: GuestService, operstate: str) -> None:
    world.host.add(f"{FOLDER}/net/nic0/operstate", operstate)
    assert create(manager).vf.interface == "nic0"


def test_a_claim_rests_on_no_survey_from_before_the_vfs_were_made(world: World, manager: GuestService) -> None:
    """Their IOMMU groups show only afterwards, also where the addresses are as the arithmetic said."""
    manager.plan(OPERATOR, parse_guest_request({"name": "asked", "image": IMAGE, "memory": "64M"}))
    manager.host_setup.create_vfs(PF, "nic0")
    group = world.host.real(f"{DEVICES}/{PF.offset(128)}/iommu_group")
    world.host.add_link(f"{group}/devices/{PF}", f"../../../../devices/pci0000:10/{PF}")
    assert create(manager).vf.index == 1


def test_a_driver_that_was_loaded_again_meanwhile_serves_the_guest_as_before(world: World, manager: GuestService) -> None:
    """Its VFs are gone and its interface has another name, which the configuration does not know yet."""
    plan = create(manager)
    manager.stop(OPERATOR, "web", 1)
    world.host.write(f"{FOLDER}/sriov_numvfs", "0")
    net = world.host.path / FOLDER / "net"
    (net / "nic0").rename(net / "ens7f0np0")
    manager.start(OPERATOR, "web")
    assert world.host.fake_net.vfs("ens7f0np0")[plan.vf.index].mac == plan.vf.mac
    manager.delete(OPERATOR, "web")
    assert world.host.text(f"{FOLDER}/sriov_numvfs") == "0"


def test_a_vf_that_cannot_be_read_stops_no_other(world: World, manager: GuestService) -> None:
    """Neither their guests' starts and ends, nor the look that keeps the PF in VEPA mode."""
    plan = create(manager)
    group = f"{world.host.real(f'{DEVICES}/{PF.offset(130)}')}/iommu_group"
    before = world.host.target(group)
    world.host.add_link(group, "../../nowhere")
    manager.allocator.surveys.discard()
    assert create(manager, name="other").vf.index == 2
    with pytest.raises(NoRoom, match=f"VF {PF.offset(130)} is used by the host: its use cannot be determined"):
        create(manager, name="third", placement={"cpus": "6-7", "vf": str(PF.offset(130))})
    manager.reconciler.on_link_change()
    manager.stop(OPERATOR, "web", 1)
    manager.start(OPERATOR, "web")
    assert manager.guest(OPERATOR, "web").plan == plan
    for name in ("web", "other"):
        manager.delete(OPERATOR, name)
    assert "undo-failed" in kinds(manager), "it may be in use: VFs are not removed"
    world.host.add_link(group, str(before))
    manager.reconciler.reconcile()
    assert world.count_undo_records() == 0


def test_a_port_whose_interfaces_cannot_be_read_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its driver is taken from it in between."""
    world = World(tmp_path / "two", Server(cores=8, nodes=2, vfs=7, pages=512))
    manager, _ = world.open_manager()
    request = parse_guest_request({"name": "asked", "image": IMAGE, "memory": "64M"})
    manager.plan(OPERATOR, request)
    net = world.host.path / FOLDER / "net"
    net.rename(net.parent / "gone")
    net.write_text("")
    monkeypatch.setattr(allocate, "SURVEY_MAX_AGE", 0.0)
    assert str(manager.plan(OPERATOR, request).plan.vf.pf) == "0000:14:00.0"
    (fault,) = [pf.fault for pf in manager.survey().pfs if pf.address == PF]
    assert "its network interfaces cannot be read" in fault
    manager.reconciler.on_link_change()


@pytest.mark.parametrize(("file", "text"), [("address", "00:00:00:00:00:00"), ("carrier", None), ("phys_port_name", None)])
def test_vf_of_an_odd_uplink_is_cleaned_up(world: World, manager: GuestService, file: str, text: str | None) -> None:
    """VFs are set by the name of its interface. It is no uplink for new guests meanwhile."""
    plan = create(manager)
    create(manager, name="neighbour")
    name = f"{FOLDER}/net/nic0/{file}"
    world.host.add(name, text or "")
    if text is None:
        world.host.read_errors[name] = EIO
    manager.allocator.surveys.discard()
    with pytest.raises(NoRoom, match="nic0"):
        create(manager, name="new")
    manager.delete(OPERATOR, "web")
    assert manager.quarantined(OPERATOR) == ()
    assert world.host.fake_net.vfs("nic0")[plan.vf.index] == VfState(plan.vf.index)


def test_invalid_numa_node_does_not_stop_link_handling(world: World, manager: GuestService) -> None:
    create(manager)
    world.host.add(f"{FOLDER}/numa_node", "none")
    manager.reconciler.on_link_change()
    with pytest.raises(HostError, match="numa_node: 'none' is not a number"):
        create(manager, name="new")


@pytest.mark.parametrize("half", ["virtfn", "physfn"])
def test_a_vf_that_only_half_the_kernel_shows_is_not_taken_for_gone(world: World, manager: GuestService, half: str) -> None:
    """As in the moment in which VFs are made or removed: its links come one after the other."""
    create(manager, name="neighbour")
    plan = create(manager)
    name = f"{FOLDER}/virtfn{plan.vf.index}" if half == "virtfn" else f"{DEVICES}/{plan.vf.address}/physfn"
    target = str(world.host.target(name))
    (world.host.path / name).unlink()
    with pytest.raises(Conflict, match="quarantine"):
        manager.delete(OPERATOR, "web")
    world.host.add_link(name, target)
    manager.clear_quarantine(OPERATOR, "web")
    assert world.host.link(f"{DEVICES}/{plan.vf.address}/driver") is None
    assert world.host.fake_net.vfs("nic0")[plan.vf.index] == VfState(plan.vf.index)


def test_next_guest_is_not_refused_while_the_nic_resets_after_its_vfs_were_removed(world: World) -> None:
    """Removing VFs resets the PF, as making them does: its link is away for a second or two."""
    manager, _ = world.open_manager()
    files = [f"{FOLDER}/net/nic0/carrier", f"{FOLDER}/net/nic0/operstate"]
    waits: list[threading.Timer] = []

    def set_link(up: bool) -> None:
        world.host.add(files[0], str(int(up)))
        world.host.add(files[1], "up" if up else "down")

    def reset(change: str) -> None:
        if change.endswith("= 0"):
            set_link(False)
            waits.append(threading.Timer(0.5, set_link, (True,)))
            waits[-1].start()

    create(manager)
    on_change(world, "sriov_numvfs = ", reset)
    manager.delete(OPERATOR, "web")
    create(manager, name="next")
    assert waits
    assert state(manager, "next") == "running"
    for wait in waits:
        wait.join()
