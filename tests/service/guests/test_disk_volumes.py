"""Emulated disks that are logical volumes: created, cleared, kept, wiped and removed; volumes of others are left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import Conflict, HostError, HypervisorError, NoRoom, OrchestratorError
from orchestrator.guests.service import GuestService
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.plan import Plan
from tests.fakes.lvm import EXTENT, FakeLvm, install_lvm
from tests.harness.crash import World, wait_wiped
from tests.harness.guests import create, open_manager, state
from tests.service.guests.test_disks import make_disk_image

REQUEST = {"disks": [{"kind": "emulated", "size": "1M"}], "accept": ["emulated-disk"]}
NAME = "nohype-web-1"
PATH = f"/dev/vg0/{NAME}"


@pytest.fixture
def lvm(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLvm:
    return install_lvm(monkeypatch, tmp_path / "lvm", world.host.path)


@pytest.fixture
def opened(world: World, lvm: FakeLvm) -> tuple[GuestService, Ledger]:
    manager, ledger = world.open_manager(replace(world.server.policy, disk_group="vg0"))
    manager.reconciler.recover()
    return manager, ledger


def watch_domains(world: World) -> list[str]:
    started: list[str] = []
    launch = world.hypervisor.create_paused
    world.hypervisor.create_paused = lambda xml: (started.append(xml), launch(xml))[1]  # type: ignore[method-assign, func-returns-value]
    return started


def test_volume_lives_as_long_as_the_guest(world: World, manager: GuestService, ledger: Ledger, lvm: FakeLvm) -> None:
    started, before = watch_domains(world), world.host.tree()
    plan = create(manager, **REQUEST)
    (disk,) = plan.disks
    assert (disk.file, disk.group, disk.size.bytes) == (PATH, "vg0", EXTENT)
    assert '<disk type="block" device="disk">' in started[0]
    assert f'<source dev="{PATH}"/>' in started[0]
    assert not any(lvm.contents(NAME).read_bytes()), "extents of former volumes have data"
    (check,) = manager.records.disk_checks(plan.uuid) or ()
    assert (check.disk, check.method, check.read, check.size) == (PATH, "write-zeroes", EXTENT, EXTENT)
    with lvm.contents(NAME).open("r+b") as file:
        file.write(b"data of the guest")
    manager.stop(OPERATOR, "web", 5)
    assert lvm.volumes()[NAME]["active"] is None
    manager.start(OPERATOR, "web")
    assert lvm.contents(NAME).read_bytes().startswith(b"data of the guest")
    contents = lvm.contents(NAME)
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    assert (ledger.read().claims, lvm.volumes(), any(contents.read_bytes())) == ((), {}, False)
    after = {name: text for name, text in world.host.tree().items() if not name.startswith(("dev/vg0", "sys/class/block"))}
    assert after == {name: text for name, text in before.items() if not name.startswith("sys/class/block")}


def test_size_is_rounded_up_to_whole_extents(manager: GuestService) -> None:
    plan = create(
        manager, disks=[{"kind": "emulated", "size": "1025K"}, {"kind": "emulated", "size": "1M"}], accept=["emulated-disk"]
    )
    assert [(disk.file, disk.size.bytes) for disk in plan.disks] == [(PATH, 2 * EXTENT), ("/dev/vg0/nohype-web-2", EXTENT)]


def test_image_is_written_to_the_volume(world: World, manager: GuestService, lvm: FakeLvm) -> None:
    data = make_disk_image(world)
    create(manager, image="root", **REQUEST)
    assert lvm.contents(NAME).read_bytes() == data.ljust(EXTENT, b"\0")


@pytest.mark.parametrize("tags", ["", "nohype"])
def test_existing_volume_is_refused_and_stays(manager: GuestService, ledger: Ledger, lvm: FakeLvm, tags: str) -> None:
    """Also one that a guest cleared by force has left."""
    lvm.add(NAME, tags=tags)
    with pytest.raises(Conflict, match=f"logical volume vg0/{NAME} exists already"):
        create(manager, **REQUEST)
    assert lvm.contents(NAME).read_bytes().startswith(b"data of others")
    assert ledger.read().claims == ()


def swap(lvm: FakeLvm) -> None:
    """Another program removes the guest's volume and creates one of the same name."""
    volumes = lvm.volumes()
    del volumes[NAME]
    lvm.change(volumes=volumes)
    lvm.add(NAME, tags="nohype")


def lose(lvm: FakeLvm) -> None:
    lvm.change(volumes={})


@pytest.mark.parametrize("harm", [swap, lose])
def test_volume_that_was_replaced_or_removed_quarantines_its_guest(
    manager: GuestService, ledger: Ledger, lvm: FakeLvm, harm: Callable[[FakeLvm], None]
) -> None:
    create(manager, **REQUEST)
    manager.stop(OPERATOR, "web", 5)
    harm(lvm)
    others = {name: lvm.contents(name).read_bytes() for name in lvm.volumes()}
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    (held,) = manager.quarantined(OPERATOR)
    assert f"logical volume {PATH}" in held.reasons[0]
    assert "was removed or replaced by another program" in held.reasons[0]
    assert {name: lvm.contents(name).read_bytes() for name in lvm.volumes()} == others
    manager.clear_quarantine(OPERATOR, "web", force=True)
    assert ledger.read().claims == ()
    assert lvm.volumes().keys() == others.keys()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group": "other"}, "volume group vg0 does not exist"),
        ({"extents": 0}, "volume group vg0 has 0.* free, requested 1M"),
        ({"copies": 2}, "2 volume groups have the name vg0"),
        ({"vg": {"vg_missing_pv_count": "1"}}, "volume group vg0 lacks 1 physical volumes"),
        ({"vg": {"vg_exported": "exported"}}, "volume group vg0 is exported"),
        ({"vg": {"vg_shared": "shared"}}, "volume group vg0 is shared with other hosts"),
        ({"vg": {"vg_permissions": "read-only"}}, "volume group vg0 is read-only"),
        ({"vg": {"vg_extent_size": "?"}}, "cannot parse the output of vgs"),
    ],
)
def test_unusable_group_is_a_reason_of_the_plan(
    manager: GuestService, ledger: Ledger, lvm: FakeLvm, change: dict[str, object], reason: str
) -> None:
    lvm.change(**change)
    with pytest.raises(NoRoom) as caught:
        create(manager, **REQUEST)
    (text,) = caught.value.reasons
    assert re.search(f"disk: {reason}", text), text
    assert ledger.read().claims == ()


def test_missing_lvm_is_named(world: World, manager: GuestService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoRoom, match="vgs is not installed"):
        create(manager, **REQUEST)


def test_group_that_is_full_by_the_time_of_the_creation_undoes_the_claim(
    manager: GuestService, ledger: Ledger, lvm: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = manager.allocator.claim

    def fill(*words: object) -> object:
        found = claim(*words)  # type: ignore[arg-type]
        lvm.change(extents=0)
        return found

    monkeypatch.setattr(manager.allocator, "claim", fill)
    with pytest.raises(HostError, match=f"cannot create logical volume vg0/{NAME} of 1M: .*insufficient free space") as caught:
        create(manager, **REQUEST)
    assert "vgs vg0" in caught.value.hint
    wait_wiped(ledger)
    assert (ledger.read().claims, ledger.quarantined(), lvm.volumes()) == ((), (), {})


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ("", " filter"),
        ('global_filter="r|^/dev/zd|"', " filter"),
        ('filter=["r|^/dev/drbd|"]', " global_filter"),
        ('filter=["r|^/dev/drbd|"]\n\tglobal_filter=["r|^/dev/zd|"]', " filter"),
    ],
)
def test_lvm_does_not_read_what_guests_have_written(manager: GuestService, lvm: FakeLvm, settings: str, chosen: str) -> None:
    """A guest could write a volume group with the name of the host's on its own disk. The operator's own filter still applies."""
    lvm.change(settings=settings)
    create(manager, name="nvme", disks=[{"serial": "disk0"}])
    create(manager, **REQUEST)
    assert not [call for call in lvm.calls() if "filter" in call], "the disk is passed through"
    manager.stop(OPERATOR, "nvme", 0)
    known = len(lvm.calls())
    manager.restart(OPERATOR, "web", 0)
    calls = lvm.calls()[known:]
    assert calls
    assert all(f'{chosen}=["r|^/dev/nvme0n1$|","r|^/dev/nvme0n1p|"]' in call for call in calls)
    assert all("scan_lvs=0" in call for call in calls)


def test_failed_start_removes_the_volume(
    world: World, manager: GuestService, ledger: Ledger, lvm: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_xml: str) -> None:
        raise HypervisorError("cannot create the guest: internal error")

    monkeypatch.setattr(world.hypervisor, "create_paused", refuse)
    lvm.add("database")
    with pytest.raises(HypervisorError):
        create(manager, **REQUEST)
    wait_wiped(ledger)
    assert (ledger.read().claims, list(lvm.volumes())) == ((), ["database"])


def test_wipe_that_fails_keeps_the_volume(
    manager: GuestService, ledger: Ledger, lvm: FakeLvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager, **REQUEST)

    def fail(*_: object) -> None:
        raise HostError("cannot erase dm-3: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.resources.disk_volume.scrub_device", fail)
        manager.delete(OPERATOR, "web")
        wait_wiped(ledger)
    assert state(manager) == "quarantined"
    assert lvm.volumes()[NAME]["active"] is None
    manager.clear_quarantine(OPERATOR, "web")
    wait_wiped(ledger)
    assert (ledger.read().claims, lvm.volumes()) == ((), {})


def test_guest_survives_the_manager_and_a_changed_configuration(world: World, manager: GuestService, lvm: FakeLvm) -> None:
    create(manager, **REQUEST)
    manager.stop(OPERATOR, "web", 5)
    manager.close()
    successor = open_manager(world)  # offers no emulated disks
    successor.start(OPERATOR, "web")
    with pytest.raises(NoRoom, match="offers no emulated disks"):
        create(successor, name="other", **REQUEST)
    successor.delete(OPERATOR, "web")


def test_existing_plans_of_files_are_read(manager: GuestService) -> None:
    """The ledger of an earlier version has no group in the disks of its plans."""
    from orchestrator.model.plain import to_plain
    from orchestrator.model.plan import plan_from_json

    plan = create(manager, **REQUEST)
    fields = to_plain(plan)
    del fields["disks"][0]["group"]
    read: Plan = plan_from_json(fields)
    assert read.disks[0].file == PATH
    assert not read.disks[0].group


def test_foreign_errors_are_one_sentence(manager: GuestService, lvm: FakeLvm) -> None:
    lvm.state.write_text("not JSON")
    with pytest.raises(OrchestratorError) as caught:
        create(manager, **REQUEST)
    assert "Traceback" not in caught.value.message.splitlines()[0]
