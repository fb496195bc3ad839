"""The life of guests' disks: planned, verified clean, filled, handed over, kept, wiped, and given back."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.api.routes.guests import show_guest
from orchestrator.errors import Conflict, HostError, HypervisorError, ImageError, NoRoom, OrchestratorError, RequestError
from orchestrator.guests.service import GuestService
from orchestrator.host.block import BlockProgress
from orchestrator.host.nvme_binding import RESERVED
from orchestrator.host.pci import VFIO, read_driver, read_override
from orchestrator.images.description import CONSOLE_PROTOCOL, Description, DiskImage, write_description
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.model.disk import DiskProgress
from orchestrator.model.plan import Plan
from orchestrator.model.state import GuestState
from orchestrator.resources import disk as disk_module
from orchestrator.values import CpuSet, PciAddress, Size
from tests.fakes.nvme import change_nvme, disk_file, read_nvme
from tests.fakes.root import DEVICES
from tests.fakes.server import CLOUD_IMAGE, DISK_SIZE, IMAGE
from tests.harness.crash import World, wait_wiped
from tests.harness.guests import create, kinds, open_manager, spoil, state, until

DISK0 = "0000:50:00.0"
SWAP = b"SWAPSPACE2"
"""The end of the first page of swap space (mkswap(8))."""


def contents(world: World, address: str = DISK0) -> bytes:
    return disk_file(world.host, address).read_bytes()


def fill(world: World, data: bytes, offset: int, address: str = DISK0) -> None:
    with disk_file(world.host, address).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def driver(world: World, address: str = DISK0) -> str | None:
    return read_driver(world.host, PciAddress.parse(address))


def accepting(world: World, *serials: str) -> GuestService:
    """A manager whose configuration names these disks."""
    manager, _ = world.open_manager(replace(world.server.policy, disk_serials=frozenset(serials)))
    return manager


def make_disk_image(world: World, *, size: int = 256 << 10, sha256: str = "", **fields: object) -> bytes:
    """An image `root` with a root file system; returns it."""
    folder, data = world.folder / "images" / "root", b"root file system".ljust(size, b"\0")
    folder.mkdir()
    for name in ("vmlinuz", "initrd"):
        (folder / name).write_text("")
    (folder / "disk.raw").write_bytes(data)
    disk = DiskImage(size=size, sha256=sha256 or hashlib.sha256(data).hexdigest(), layout="ext4")
    description = Description(
        cmdline="quiet", console=CONSOLE_PROTOCOL, kernel_version="6.12", hash="1", memory=Size.parse("64M"), disk=disk
    )
    write_description(folder, description.model_copy(update=fields))
    return data


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Each erasure reports half of its work, and then waits until the event is set."""
    release, erase = threading.Event(), disk_module.scrub_controller

    def wait(
        host: object, address: object, serial: object, namespaces: object, report: Callable[[BlockProgress], None]
    ) -> object:
        report(BlockProgress("nvme0n1", "verify", 1, 2))
        release.wait(30)
        return erase(host, address, serial, namespaces, report)  # type: ignore[arg-type]

    monkeypatch.setattr(disk_module, "scrub_controller", wait)
    yield release
    release.set()


def test_guest_owns_its_disk_until_it_is_deleted(world: World, manager: GuestService, ledger: Ledger) -> None:
    before = world.host.tree()
    (disk,) = create(manager, disks=[{"serial": "disk0"}]).disks
    assert (disk.serial, str(disk.address), disk.size) == ("disk0", DISK0, Size(DISK_SIZE))
    assert driver(world) == VFIO
    assert not world.host.exists("dev/nvme0n1")
    written = contents(world)
    assert any(written)
    manager.stop(OPERATOR, "web", 5)
    assert driver(world) == "nvme"
    manager.start(OPERATOR, "web")
    assert contents(world) == written
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    assert not any(contents(world))
    assert ledger.read().claims == ()
    assert world.host.tree() == before
    assert world.host.violations() == []
    until(lambda: kinds(manager)[-2:] == ["wiping", "deleted"])


def test_stopped_guests_disk_is_marked_and_not_given_to_others(world: World, manager: GuestService) -> None:
    create(manager, disks=[{"serial": "disk0"}])
    manager.stop(OPERATOR, "web", 5)
    assert read_override(world.host, PciAddress.parse(DISK0)) == "nvme"
    with pytest.raises(NoRoom, match="owned by a guest"):
        create(manager, name="other", disks=[{"serial": "disk0"}])
    assert {disk.serial for disk in create(manager, name="other", disks=[{}, {}]).disks} == {"disk1", "disk2"}


def test_survey_examines_no_disk_of_a_guest(world: World, manager: GuestService) -> None:
    """For that it opens the disk exclusively, and a start or a wipe at the same time would fail."""
    create(manager, disks=[{"serial": "disk0"}])
    manager.stop(OPERATOR, "web", 5)
    fill(world, SWAP, 4086, "0000:51:00.0")
    found = {disk.serial: disk.signatures for disk in manager.survey_with_use().controllers}
    assert (any(contents(world)), found["disk0"], found["disk2"]) == (True, (), ())
    assert found["disk1"]


@pytest.mark.parametrize(
    ("data", "offset"), [(SWAP, 4086), (b"LABELONE".ljust(24, b"\0") + b"LVM2 001", 512), (b"raw data", 4096)]
)
def test_disk_with_contents_is_refused_and_not_changed(world: World, manager: GuestService, data: bytes, offset: int) -> None:
    fill(world, data, offset)
    before, tree = contents(world), world.host.tree()
    with pytest.raises(NoRoom, match="not empty: .*add the serial to .disks. serials"):
        create(manager, disks=[{"serial": "disk0"}])
    assert (contents(world), world.host.tree()) == (before, tree)


def test_data_that_only_a_full_read_finds_fails_the_creation_and_stays(
    world: World, manager: GuestService, ledger: Ledger
) -> None:
    """It is beyond the parts of the disk that the survey reads."""
    change_nvme(world.host, DISK0, replace(read_nvme(world.host, DISK0), size=4 << 20))
    with disk_file(world.host, DISK0).open("r+b") as file:
        file.truncate(4 << 20)
    world.host.add("sys/class/block/nvme0n1/size", str((4 << 20) // 512))
    fill(world, b"a raw database", 2 << 20)
    before, tree = contents(world), world.host.tree()
    with pytest.raises(Conflict, match=f"disk disk0 is not empty: nvme0n1 holds data at offset {2 << 20}") as caught:
        create(manager, disks=[{"serial": "disk0"}])
    assert "[disks] serials" in caught.value.hint
    assert contents(world) == before
    assert ledger.read().claims == ()
    assert world.host.tree() == tree


def test_disk_in_use_is_refused(world: World, manager: GuestService) -> None:
    world.host.add("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1 partition 1020 0 -2")
    with pytest.raises(NoRoom, match="used by the host: nvme0n1 is used for swap"):
        create(manager, disks=[{"serial": "disk0"}])


def test_use_that_starts_after_the_plan_is_refused_at_the_start(world: World, manager: GuestService, ledger: Ledger) -> None:
    """The first start of a stopped guest: somebody has mounted its disk meanwhile."""
    create(manager, disks=[{"serial": "disk0"}])
    manager.stop(OPERATOR, "web", 5)
    before = contents(world)
    world.host.add("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1 partition 1020 0 -2")
    with pytest.raises(HostError, match="is used by the host .*nvme0n1 is used for swap"):
        manager.start(OPERATOR, "web")
    assert (state(manager), contents(world), driver(world)) == ("stopped", before, "nvme")


def test_named_serial_is_erased_and_verified_before_the_guest_gets_it(world: World) -> None:
    fill(world, SWAP, 4086)
    manager = accepting(world, "disk0")
    plan = create(manager, disks=[{"serial": "disk0"}])
    assert SWAP not in contents(world)
    (check,) = manager.records.disk_checks(plan.uuid) or ()
    assert (check.disk, check.method, check.read, check.size) == ("disk0", "format", DISK_SIZE, DISK_SIZE)
    assert world.host.violations() == []


def test_clean_disk_is_only_read(world: World, manager: GuestService) -> None:
    plan = create(manager, disks=[{"serial": "disk0"}])
    (check,) = manager.records.disk_checks(plan.uuid) or ()
    assert (check.method, check.read, check.image) == ("read", DISK_SIZE, "")


def test_wiping_holds_up_nobody(world: World, manager: GuestService, ledger: Ledger, blocked: threading.Event) -> None:
    plan = create(manager, disks=[{"serial": "disk0"}], cores=2)
    manager.delete(OPERATOR, "web")
    until(lambda: manager.guest(OPERATOR, "web").progress)
    view = manager.guest(OPERATOR, "web")
    assert (view.state, view.progress) == ("wiping", DiskProgress("disk0", "verify", 50))
    assert view.plan == plan.only_disks()
    shown = show_guest(view, CpuSet())
    assert (shown["vf"], shown["nics"], shown["cores"], shown["memory"]) == (None, [], [], 0)
    assert shown["progress"] == {"disk": "disk0", "phase": "verify", "percent": 50}
    # Everything else of the guest can be had already.
    again = create(manager, name="other", placement={"cpus": str(CpuSet.of(plan.cpus)), "vf": str(plan.vf.address)})
    assert again.cpus == plan.cpus
    manager.delete(OPERATOR, "web")
    assert state(manager) == "wiping"
    for change in (manager.start, manager.kill):
        with pytest.raises(Conflict, match="guest web is wiping and can't become"):
            change(OPERATOR, "web")
    with pytest.raises(Conflict, match="the name web is taken"):
        create(manager)
    with pytest.raises(NoRoom, match="owned by a guest"):
        create(manager, name="third", disks=[{"serial": "disk0"}])
    manager.delete(OPERATOR, "other")
    manager.reconciler.reconcile()
    assert state(manager) == "wiping"
    blocked.set()
    wait_wiped(ledger)
    assert create(manager, disks=[{"serial": "disk0"}]).disks == plan.disks
    assert world.host.violations() == []


def test_wiping_survives_the_manager(world: World, manager: GuestService, ledger: Ledger, blocked: threading.Event) -> None:
    create(manager, disks=[{"serial": "disk0"}])
    manager.delete(OPERATOR, "web")
    until(lambda: manager.guest(OPERATOR, "web").progress)
    stopper = threading.Thread(target=manager.close)
    stopper.start()
    stopper.join(20)
    assert not stopper.is_alive(), "the manager waits for the end of wiping"
    blocked.set()
    until(lambda: not any(thread.name == "wipe-web" for thread in threading.enumerate()))
    assert state(manager) == "wiping"
    assert any(contents(world))
    successor, fresh = world.open_manager()
    successor.reconciler.recover()
    wait_wiped(fresh)
    assert fresh.read().claims == ()
    assert not any(contents(world))


def test_power_cut_while_wiping_loses_no_disk(
    world: World, manager: GuestService, ledger: Ledger, blocked: threading.Event
) -> None:
    create(manager, disks=[{"serial": "disk0"}])
    manager.delete(OPERATOR, "web")
    until(lambda: manager.guest(OPERATOR, "web").progress)
    manager.close()
    blocked.set()
    until(lambda: not any(thread.name == "wipe-web" for thread in threading.enumerate()))
    world.reboot()
    successor, fresh = world.open_manager()
    successor.reconciler.recover()
    wait_wiped(fresh)
    assert (fresh.read().claims, fresh.quarantined()) == ((), ())
    assert not any(contents(world))


def test_secret_file_is_gone_while_disks_are_wiped(
    world: World, manager: GuestService, ledger: Ledger, blocked: threading.Event
) -> None:
    create(manager, image=CLOUD_IMAGE, user_data="#cloud-config\n{}\n", disks=[{}])
    assert [path.suffix for path in sorted(world.secrets.iterdir())] == [".initrd", ".json"]
    manager.delete(OPERATOR, "web")
    until(lambda: manager.guest(OPERATOR, "web").progress)
    assert list(world.secrets.iterdir()) == []
    blocked.set()
    wait_wiped(ledger)


def test_secret_file_of_a_guest_that_cannot_be_released_is_removed(world: World, manager: GuestService) -> None:
    plan = create(manager, image=CLOUD_IMAGE, user_data="#cloud-config\n{}\n")
    spoil(world, plan)
    with pytest.raises(Conflict, match="quarantined: cleanup not verified"):
        manager.delete(OPERATOR, "web")
    assert list(world.secrets.iterdir()) == []


@pytest.mark.parametrize(
    ("lies", "says"),
    [
        (("format", "write-zeroes", "overwrite"), "format: it reported success, but the byte at offset"),
        (("format", "overwrite"), ""),
        (("format", "write-zeroes"), ""),
    ],
)
def test_disk_that_lies_is_erased_in_another_way_or_quarantined(
    world: World, manager: GuestService, ledger: Ledger, lies: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager, disks=[{"serial": "disk0"}])
    change_nvme(world.host, DISK0, replace(read_nvme(world.host, DISK0), lies=lies))
    if "overwrite" in lies:
        _break_writes(monkeypatch)
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    if not says:
        assert ledger.read().claims == ()
        assert not any(contents(world))
        return
    (held,) = manager.quarantined(OPERATOR)
    assert says in held.reasons[0]
    assert any(contents(world))
    assert read_override(world.host, PciAddress.parse(DISK0)) == "nvme", "udev would examine what the guest has written"
    assert (world.host.path / RESERVED / "nvme-disk0").exists()
    with pytest.raises(NoRoom, match="owned by a guest"):
        create(manager, name="other", disks=[{"serial": "disk0"}])
    change_nvme(world.host, DISK0, replace(read_nvme(world.host, DISK0), lies=()))
    manager.clear_quarantine(OPERATOR, "web")
    wait_wiped(ledger)
    assert (ledger.read().claims, any(contents(world))) == ((), False)


def _break_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.host import scrub

    monkeypatch.setattr(scrub, "write_at", lambda *_: None)


def test_disk_that_stays_dirty_does_not_keep_the_guests_other_disk(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager, disks=[{"serial": "disk0"}, {"serial": "disk1"}])
    scrub = disk_module.scrub_controller

    def fail(host: object, address: object, serial: str, *rest: object) -> object:
        if serial == "disk0":
            raise HostError("cannot erase nvme0n1: Input/output error")
        return scrub(host, address, serial, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(disk_module, "scrub_controller", fail)
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    (held,) = manager.quarantined(OPERATOR)
    assert "cannot erase nvme0n1" in held.reasons[0]
    overrides = [read_override(world.host, PciAddress.parse(address)) for address in (DISK0, "0000:51:00.0")]
    assert overrides == ["nvme", ""]
    monkeypatch.undo()
    manager.clear_quarantine(OPERATOR, "web")
    wait_wiped(ledger)
    assert ledger.read().claims == ()


@pytest.mark.parametrize("clean", [True, False])
def test_wipe_is_counted(world: World, monkeypatch: pytest.MonkeyPatch, clean: bool) -> None:
    ledger = Ledger(world.folder / "counted.sqlite")
    counted: list[tuple[int, bool]] = []
    manager = GuestService(
        world.host, world.hypervisor, ledger, world.server.policy,  # type: ignore[arg-type]
        images=world.folder / "images", consoles=world.folder / "consoles",
        count_wipe=lambda size, *, is_clean: counted.append((size, is_clean)),
    )  # fmt: skip
    create(manager, disks=[{"serial": "disk0"}, {"serial": "disk1"}])
    if not clean:
        change_nvme(world.host, DISK0, replace(read_nvme(world.host, DISK0), lies=("format", "write-zeroes", "overwrite")))
        _break_writes(monkeypatch)
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    until(lambda: counted)
    assert counted == [(2 * DISK_SIZE, clean)]


def test_disk_that_vanished_is_quarantined_until_it_is_back(world: World, manager: GuestService, ledger: Ledger) -> None:
    create(manager, disks=[{"serial": "disk0"}])
    manager.stop(OPERATOR, "web", 5)
    link = world.host.path / DEVICES / DISK0
    link.rename(world.folder / "pulled")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(disk_module, "PROBE_SECONDS", 0.1)
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    (held,) = manager.quarantined(OPERATOR)
    assert "disk disk0 cannot be wiped: no NVMe controller with this serial number" in held.reasons[0]
    monkey.undo()
    (world.folder / "pulled").rename(link)
    manager.clear_quarantine(OPERATOR, "web")
    wait_wiped(ledger)
    assert ledger.read().claims == ()
    assert not any(contents(world))


def test_disk_that_vanishes_while_it_is_checked_leaves_no_mark(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, pulled = world.host.path / DEVICES / DISK0, world.folder / "pulled"

    def pull(*_: object) -> None:
        link.rename(pulled)
        raise HostError("cannot read nvme0n1 at offset 0: Input/output error")

    monkeypatch.setattr(disk_module, "find_data", pull)
    with pytest.raises(HostError, match="cannot read"):
        create(manager, disks=[{"serial": "disk0"}])
    assert ledger.read().claims == ()
    assert not list((world.host.path / RESERVED).iterdir())


def test_mark_of_a_vanished_disk_stays_if_its_guest_is_cleared_by_force(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the data of the guest."""
    create(manager, disks=[{"serial": "disk0"}])
    manager.stop(OPERATOR, "web", 5)
    (world.host.path / DEVICES / DISK0).rename(world.folder / "pulled")
    monkeypatch.setattr(disk_module, "PROBE_SECONDS", 0.1)
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    manager.clear_quarantine(OPERATOR, "web", force=True)
    assert ledger.read().claims == ()
    assert (world.host.path / RESERVED / "nvme-disk0").exists()


def test_disk_of_a_guest_cleared_by_force_is_not_given_away_with_its_data(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager, disks=[{"serial": "disk0"}])
    change_nvme(world.host, DISK0, replace(read_nvme(world.host, DISK0), lies=("format", "write-zeroes", "overwrite")))
    _break_writes(monkeypatch)
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    manager.clear_quarantine(OPERATOR, "web", force=True)
    assert ledger.read().claims == ()
    assert not read_override(world.host, PciAddress.parse(DISK0))
    assert not (world.host.path / RESERVED / "nvme-disk0").exists()
    with pytest.raises(NoRoom, match="not empty"):
        create(manager, disks=[{"serial": "disk0"}])


def test_failed_start_wipes_what_was_written(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_disk_image(world)

    def refuse(_xml: str) -> None:
        raise HypervisorError("cannot create the guest: internal error")

    monkeypatch.setattr(world.hypervisor, "create_paused", refuse)
    with pytest.raises(HypervisorError):
        create(manager, image="root", disks=[{"serial": "disk0"}])
    wait_wiped(ledger)
    assert ledger.read().claims == ()
    assert not any(contents(world))


def test_image_is_written_once_and_read_back(world: World, manager: GuestService, ledger: Ledger) -> None:
    data = make_disk_image(world)
    plan = create(manager, image="root", disks=[{}])
    assert contents(world)[: len(data)] == data
    (check,) = manager.records.disk_checks(plan.uuid) or ()
    assert check.image == hashlib.sha256(data).hexdigest()
    fill(world, b"written by the guest", 0)
    manager.restart(OPERATOR, "web", 5)
    assert contents(world).startswith(b"written by the guest")
    manager.delete(OPERATOR, "web")
    wait_wiped(ledger)
    assert not any(contents(world))


def test_image_larger_than_every_disk_is_refused(world: World, manager: GuestService) -> None:
    make_disk_image(world, size=DISK_SIZE + 4096)
    with pytest.raises(NoRoom, match=f"no free NVMe controller of at least {Size(DISK_SIZE + 4096)}"):
        create(manager, image="root", disks=[{}])


def test_image_without_root_in_ram_needs_a_disk(world: World, manager: GuestService) -> None:
    make_disk_image(world)
    with pytest.raises(RequestError, match="image root has its root file system on a disk"):
        create(manager, image="root")


def test_damaged_image_fails_the_creation_and_leaves_a_clean_disk(world: World, manager: GuestService, ledger: Ledger) -> None:
    make_disk_image(world, sha256="0" * 64)
    with pytest.raises(ImageError, match="expected 0000"):
        create(manager, image="root", disks=[{"serial": "disk0"}])
    wait_wiped(ledger)
    assert ledger.read().claims == ()
    assert not any(contents(world))


def test_firmware_boots_from_the_disk(world: World, manager: GuestService) -> None:
    make_disk_image(world, boot="firmware")
    started: list[str] = []
    launch = world.hypervisor.create_paused
    world.hypervisor.create_paused = lambda xml: (started.append(xml), launch(xml))[1]  # type: ignore[method-assign, func-returns-value]
    create(manager, image="root", disks=[{}])
    assert "<kernel>" not in started[0]
    assert '<boot order="1"/>' in started[0]


def test_disk_in_another_slot_is_not_used(world: World, manager: GuestService) -> None:
    """Its serial number and address are both checked: the plan and the XML hold the address."""
    create(manager, disks=[{"serial": "disk0"}])
    manager.stop(OPERATOR, "web", 5)
    for address, serial in ((DISK0, "disk1"), ("0000:51:00.0", "disk0")):
        change_nvme(world.host, address, replace(read_nvme(world.host, address), serial=serial))
        (name,) = world.host.names(f"{DEVICES}/{address}/nvme")
        world.host.add(f"{DEVICES}/{address}/nvme/{name}/serial", serial)
    with pytest.raises(HostError, match=f"disk disk0 is at 0000:51:00.0, planned at {DISK0}"):
        manager.start(OPERATOR, "web")


def test_drift_of_a_disks_driver_is_reported(world: World, manager: GuestService) -> None:
    create(manager, disks=[{"serial": "disk0"}])
    world.host.add_link(f"{DEVICES}/{DISK0}/driver", "../../../bus/pci/drivers/nvme")
    manager.reconciler.detect_drift()
    (event,) = [event for event in manager.events(OPERATOR) if event.kind == "drifted"]
    assert f"disk disk0 ({DISK0}): driver nvme, expected vfio-pci" in event.detail


def test_second_request_with_the_id_of_a_guest_that_is_wiped_is_refused(
    manager: GuestService, ledger: Ledger, blocked: threading.Event
) -> None:
    create(manager, disks=[{}], id="job-1")
    manager.delete(OPERATOR, "web")
    with pytest.raises(Conflict, match="guest web was deleted and its disks are being wiped"):
        create(manager, disks=[{}], id="job-1")


def test_guest_started_by_hand_while_it_is_wiped_is_quarantined(
    world: World, manager: GuestService, ledger: Ledger, blocked: threading.Event
) -> None:
    plan = create(manager, disks=[{"serial": "disk0"}])
    guest = world.hypervisor.read_guest("web")
    manager.delete(OPERATOR, "web")
    _start_by_hand(world, plan, guest.pid)
    manager.reconciler.reconcile()
    assert state(manager) == "quarantined"
    blocked.set()
    until(lambda: not any(thread.name == "wipe-web" for thread in threading.enumerate()))
    assert state(manager) == "quarantined"
    world.hypervisor.end("web")
    manager.clear_quarantine(OPERATOR, "web")
    wait_wiped(ledger)
    assert ledger.read().claims == ()


def _start_by_hand(world: World, plan: Plan, pid: int) -> None:
    from tests.harness.guests import start_by_hand

    assert pid
    start_by_hand(world, plan)


class TestEmulated:
    """Disks that are files of the host."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "disks"
        folder.mkdir()
        return folder

    @pytest.fixture
    def manager(self, world: World, folder: Path) -> GuestService:
        return open_manager(world, replace(world.server.policy, disk_folder=str(folder)))

    REQUEST = {"disks": [{"kind": "emulated", "size": "1M"}], "accept": ["emulated-disk"]}

    def test_file_lives_as_long_as_the_guest(self, world: World, manager: GuestService, folder: Path) -> None:
        started: list[str] = []
        launch = world.hypervisor.create_paused
        world.hypervisor.create_paused = lambda xml: (started.append(xml), launch(xml))[1]  # type: ignore[method-assign, func-returns-value]
        plan = create(manager, **self.REQUEST)
        file = folder / "web-1.raw"
        assert plan.disks[0].file == str(file)
        assert (file.stat().st_size, file.stat().st_blocks * 512 >= 1 << 20, file.stat().st_mode & 0o777) == (
            1 << 20,
            True,
            0o600,
        )
        assert f'<source file="{file}"/>' in started[0]
        file.write_bytes(b"the guest's data")
        manager.restart(OPERATOR, "web", 5)
        assert file.read_bytes() == b"the guest's data"
        view = manager.guest(OPERATOR, "web")
        assert show_guest(view, CpuSet())["waived"] == ["emulated-disk"]
        manager.delete(OPERATOR, "web")
        assert list(folder.iterdir()) == []
        assert manager.guests(OPERATOR) == ()

    def test_existing_file_is_refused_and_stays(self, manager: GuestService, folder: Path) -> None:
        (folder / "web-1.raw").write_text("not the manager's")
        with pytest.raises(Conflict, match="exists already: it is not the manager's"):
            create(manager, **self.REQUEST)
        assert (folder / "web-1.raw").read_text() == "not the manager's"
        assert manager.guests(OPERATOR) == ()

    def test_link_in_place_of_the_file_is_refused(self, manager: GuestService, folder: Path) -> None:
        (folder / "web-1.raw").symlink_to(folder / "elsewhere")
        with pytest.raises(Conflict, match="exists already"):
            create(manager, **self.REQUEST)
        assert not (folder / "elsewhere").exists()

    def test_missing_folder_fails_the_creation(self, manager: GuestService, folder: Path) -> None:
        folder.rmdir()
        with pytest.raises(OrchestratorError, match="does not exist"):
            create(manager, **self.REQUEST)
        assert manager.guests(OPERATOR) == ()

    def test_image_is_written_to_the_file(self, world: World, manager: GuestService, folder: Path) -> None:
        data = make_disk_image(world)
        create(manager, image="root", **self.REQUEST)
        assert (folder / "web-1.raw").read_bytes() == data.ljust(1 << 20, b"\0")

    def test_damaged_image_leaves_no_file(self, world: World, manager: GuestService, folder: Path) -> None:
        make_disk_image(world, sha256="0" * 64)
        with pytest.raises(ImageError):
            create(manager, image="root", **self.REQUEST)
        assert list(folder.iterdir()) == []


def test_state_of_a_wiping_guest_is_read_from_the_file(world: World, manager: GuestService, blocked: threading.Event) -> None:
    create(manager, disks=[{}])
    manager.delete(OPERATOR, "web")
    _, again = world.open_manager()
    (claim,) = again.read().claims
    assert (claim.state, claim.plan.cores, claim.plan.nics, claim.plan.pages) == (GuestState.WIPING, (), (), 0)
    assert claim.request.image == IMAGE
