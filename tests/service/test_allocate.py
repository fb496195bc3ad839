"""Where guests are put on a host that other people use too: an earlier survey must not hide what has changed since."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest

from orchestrator.client.problems import STATUS
from orchestrator.errors import HostError, ImageError, NoRoom, RequestError
from orchestrator.guests import survey_cache
from orchestrator.guests.core_manager import CoreManager
from orchestrator.guests.service import GuestService
from orchestrator.host.pci import VFIO, bind_driver, release_driver
from orchestrator.host.root import HostRoot
from orchestrator.images.description import DiskImage, RamRoot, write_description
from orchestrator.images.store import read_image
from orchestrator.model.access import OPERATOR
from orchestrator.model.plan import Plan
from orchestrator.model.request import parse_guest_request
from orchestrator.model.topology import Topology
from orchestrator.values import Size
from tests.fakes.root import DEVICES
from tests.fakes.server import IMAGE, Server
from tests.harness.crash import World
from tests.harness.guests import use_pages

SERVER = Server(cores=8, nodes=2, vfs=3, pages=64)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, SERVER)


@pytest.fixture
def manager(world: World) -> GuestService:
    """With one guest, so that the VFs of one uplink are made."""
    found, _ = world.open_manager()
    create(found, "first")
    return found


def create(manager: GuestService, name: str, **fields: object) -> Plan:
    return manager.create(OPERATOR, parse_guest_request({"name": name, "image": IMAGE, "memory": "64M", **fields}))[0].plan


def ask(manager: GuestService, **fields: object) -> Plan:
    request = {"name": "asked", "image": IMAGE, "memory": "64M", **fields}
    return manager.plan(OPERATOR, parse_guest_request(request)).plan


def test_a_vf_that_somebody_has_taken_meanwhile_is_left_to_them(world: World, manager: GuestService) -> None:
    vf = ask(manager).vf.address
    bind_driver(world.host, vf, VFIO)
    assert ask(manager).vf.address != vf
    with pytest.raises(NoRoom, match="no room") as caught:
        ask(manager, placement={"cpus": "4-5", "vf": str(vf)})
    assert f"VF {vf} is owned by a guest" in str(caught.value.reasons)
    release_driver(world.host, vf, None)
    assert ask(manager).vf.address == vf


def test_a_vf_that_somebody_has_given_back_is_free(world: World, manager: GuestService) -> None:
    """Also if it was seen as taken in the survey that is brought up to date."""
    vf = ask(manager).vf.address
    bind_driver(world.host, vf, VFIO)
    ask(manager)
    release_driver(world.host, vf, None)
    assert ask(manager).vf.address == vf


def test_pages_that_somebody_has_taken_are_not_promised(world: World, manager: GuestService) -> None:
    plan = ask(manager)
    world.host.add(f"sys/devices/system/node/node{plan.node}/hugepages/hugepages-2048kB/free_hugepages", "1")
    assert ask(manager).node != plan.node


def test_pages_that_the_host_keeps_are_kept_when_a_pool_shrinks(world: World) -> None:
    manager, _ = world.open_manager(replace(SERVER.policy, reserved_pages=((Size.parse("2M"), 16),)))
    create(manager, "first")
    ask(manager, memory="96M")
    for node in range(SERVER.nodes):
        for file in ("nr_hugepages", "free_hugepages"):
            world.host.add(f"sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/{file}", "48")
    with pytest.raises(NoRoom, match="no room"):
        ask(manager, memory="96M")


def test_a_port_that_has_lost_its_link_is_not_used(world: World, manager: GuestService) -> None:
    plan = ask(manager)
    world.host.add(f"sys/bus/pci/devices/{plan.vf.pf}/net/{plan.vf.interface}/operstate", "down")
    assert ask(manager).vf.pf != plan.vf.pf


def test_a_port_that_has_its_link_again_is_used(world: World, manager: GuestService) -> None:
    """Nothing is refused for what was so a moment ago."""
    files = [f"sys/bus/pci/devices/{pf.address}/net/{pf.interface}/operstate" for pf in manager.survey().pfs]
    for file in files:
        world.host.add(file, "down")
    with pytest.raises(NoRoom, match="no room"):
        ask(manager)
    world.host.add(files[0], "up")
    ask(manager)


def test_a_port_with_another_name_is_found(world: World, manager: GuestService) -> None:
    plan = ask(manager)
    net = world.host.path / f"sys/bus/pci/devices/{plan.vf.pf}/net"
    (net / plan.vf.interface).rename(net / "renamed")
    assert ask(manager).vf.pf != plan.vf.pf


def test_an_earlier_survey_is_not_read_again(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files and not a thousand: what a plan reads does not grow with the number of VFs."""
    ask(manager)
    reads: list[str] = []
    read = type(world.host).read
    monkeypatch.setattr(type(world.host), "read", lambda self, name: reads.append(name) or read(self, name))
    ask(manager)
    assert {name.rsplit("/", 1)[1] for name in reads} == {
        "nr_hugepages", "free_hugepages", "resv_hugepages", "operstate", "carrier", "online",
    }  # fmt: skip
    assert len(reads) == SERVER.nodes + 5


@pytest.mark.parametrize(("age", "is_read"), [(0.0, False), (4.0, False), (6.0, True), (9.0, True), (11.0, False)])
def test_a_survey_is_read_again_before_it_is_too_old(
    manager: GuestService, monkeypatch: pytest.MonkeyPatch, age: float, *, is_read: bool
) -> None:
    """After that, the next claim reads it, and others wait."""
    surveys, found = manager.allocator.surveys, []
    surveys.get(time.monotonic())
    now = time.monotonic() + age
    monkeypatch.setattr(survey_cache, "time", SimpleNamespace(monotonic=lambda: now))
    read = survey_cache.refresh_topology
    monkeypatch.setattr(survey_cache, "refresh_topology", lambda *arguments: found.append(now) or read(*arguments))
    surveys.renew(max_age=10.0)
    assert bool(found) is is_read
    surveys.renew(max_age=10.0)
    assert len(found) == is_read


def test_a_claim_does_not_wait_while_a_survey_is_read_early(manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one that needs a later survey does."""
    surveys = manager.allocator.surveys
    surveys.get(time.monotonic())
    earlier = time.monotonic() - 0.001
    monkeypatch.setattr(survey_cache, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 6.0))
    reading, go_on, read = threading.Event(), threading.Event(), survey_cache.refresh_topology

    def read_slowly(host: HostRoot, cached: Topology) -> Topology:
        reading.set()
        assert go_on.wait(30)
        return read(host, cached)

    monkeypatch.setattr(survey_cache, "refresh_topology", read_slowly)
    with ThreadPoolExecutor() as threads:
        renewal = threads.submit(surveys.renew, 10.0)
        assert reading.wait(30)
        surveys.renew(max_age=10.0)  # by another claim: at once
        surveys.get(earlier - 1.0)
        later = threads.submit(surveys.get, time.monotonic() + 3.0)
        assert not later.done()
        go_on.set()
        renewal.result(30)
        assert later.result(30) is surveys.get(time.monotonic() + 3.0)


def test_survey_that_was_begun_before_a_failure_is_not_used_after_it(
    manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveys, read = manager.allocator.surveys, survey_cache.refresh_topology
    surveys.get(time.monotonic())

    def fail_meanwhile(host: HostRoot, cached: Topology) -> Topology:
        surveys.discard()
        return read(host, cached)

    monkeypatch.setattr(survey_cache, "refresh_topology", fail_meanwhile)
    begun_before = surveys.get(time.monotonic())
    assert surveys.get(0.0) is not begun_before


@pytest.fixture
def small(tmp_path: Path) -> tuple[World, GuestService]:
    """A host with one pool of 100 pages, and a guest that has 32 of them."""
    world = World(tmp_path / "small", Server(cores=8, nodes=1, vfs=7, pages=100))
    manager, _ = world.open_manager()
    create(manager, "a")
    return world, manager


@pytest.mark.parametrize("moment", ["stopping", "ended", "quarantined"])
def test_pages_of_a_guest_that_has_ended_are_still_its_own(
    small: tuple[World, GuestService], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The pool shows them as free again. What another program has taken must not hide that they are promised."""
    world, manager = small
    plan = manager.guest(OPERATOR, "a").plan
    use_pages(world, plan, 7000, 30)
    told: list[str] = []

    def ask_for_60(*_: object) -> tuple[str, ...]:
        with pytest.raises(NoRoom) as caught:
            ask(manager, memory="120M")
        told.extend(caught.value.reasons)
        return ()

    if moment == "stopping":
        clean_up = CoreManager.clean_up
        monkeypatch.setattr(CoreManager, "clean_up", lambda core: (*clean_up(core), *ask_for_60()))
        manager.stop(OPERATOR, "a", 0)
    elif moment == "ended":
        world.hypervisor.end("a")
        ask_for_60()
    else:
        (world.host.path / DEVICES / str(plan.vf.address) / "reset").unlink()
        assert manager.stop(OPERATOR, "a", 0).state == "quarantined"
        ask_for_60()
    assert "38 of 100 huge pages of 2M are free, 60 requested" in str(told)


def test_pages_of_a_guest_that_is_being_started_count_once(
    small: tuple[World, GuestService], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment that QEMU has taken them: its first exit may take a minute."""
    world, manager = small
    resume, found = world.hypervisor.resume, []

    def resume_slowly(uuid: UUID) -> None:
        found.append(ask(manager))
        resume(uuid)

    monkeypatch.setattr(world.hypervisor, "resume", resume_slowly)
    create(manager, "b")
    assert found[0].pages == 32


@pytest.mark.parametrize("content", ['{"cmdline": ["a"]}', "[" * 100_000, "{}"])
def test_a_damaged_image_is_told_before_anything_is_claimed(world: World, manager: GuestService, content: str) -> None:
    """Not as a fault of the manager: another image can be asked for."""
    (world.folder / "images" / IMAGE / "image.json").write_text(content)
    before = manager.guests(OPERATOR)
    with pytest.raises(ImageError, match=f"guest image {IMAGE} is damaged: image.json: ") as caught:
        create(manager, "second")
    assert STATUS[caught.value.code] == 409
    assert manager.guests(OPERATOR) == before
    assert [event.kind for event in manager.events(OPERATOR, None, 1)] == ["plan-failed"], "and it is not claimed and undone"


def describe_image(world: World, **fields: object) -> None:
    image = read_image(world.folder / "images" / IMAGE)
    for name in ("ram-initrd", "disk.raw"):
        (image.folder / name).touch()
    write_description(image.folder, image.model_copy(update=fields))


def test_guest_without_a_disk_has_memory_for_its_root(world: World, manager: GuestService) -> None:
    root = RamRoot(packed=4 << 20, unpacked=8 << 20)
    describe_image(world, ram_root=root)
    before = manager.guests(OPERATOR)
    for verb in (ask, lambda manager, **fields: create(manager, "asked", **fields)):
        with pytest.raises(RequestError, match="minimal needs 82M of memory for its root in memory, requested 80M") as caught:
            verb(manager, memory="80M")
        assert "82M" in caught.value.hint
    assert manager.guests(OPERATOR) == before
    assert create(manager, "asked", memory="82M").memory == root.min_memory


def test_image_that_boots_only_from_a_disk_is_refused_without_one(world: World, manager: GuestService) -> None:
    describe_image(world, disk=DiskImage(size=1 << 20, sha256="0" * 64, layout="ext4"))
    with pytest.raises(RequestError, match="image minimal has its root file system on a disk"):
        ask(manager)


def test_survey_that_a_failed_start_has_contradicted_is_read_again(world: World, manager: GuestService) -> None:
    """The next guest does not get the resource that the last one failed on."""
    vf = ask(manager).vf
    group = world.host.path / DEVICES / str(vf.address) / "iommu_group"
    world.host.add_link(f"sys/kernel/iommu_groups/{group.resolve().name}/devices/{vf.pf}", f"../../../../{DEVICES}/{vf.pf}")
    with pytest.raises(HostError, match="IOMMU group"):
        create(manager, "second")
    assert create(manager, "third").vf.address != vf.address
