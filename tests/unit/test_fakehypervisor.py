"""The hypervisor that the crash tests play with refuses what must never be, and says so."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator.domain import build_domain
from orchestrator.errors import HypervisorError, NotFound
from orchestrator.host.hugepages import survey_pools
from orchestrator.hypervisor.connection import EndCause
from orchestrator.images.store import find_image
from orchestrator.model.access import OPERATOR
from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.model.topology import VfState
from orchestrator.values import CpuSet, PciAddress
from tests.fakes.hypervisor import FakeHypervisor
from tests.fakes.root import DEVICES, FakeRoot, all_read
from tests.fakes.server import IMAGE
from tests.harness.crash import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A host on which guest0 runs."""
    made = World(tmp_path / "world")
    manager, _ = made.open_manager()
    manager.create(OPERATOR, GuestRequest(name="guest0", memory="64M", image=IMAGE))
    return made


def plan_of(world: World) -> Plan:
    """That of guest0."""
    return world.open_manager()[0].guest(OPERATOR, "guest0").plan


def start(world: World, plan: Plan) -> None:
    """Starts a guest past the manager."""
    world.hypervisor.create_paused(
        build_domain(plan, find_image(world.folder / "images", IMAGE), world.server.policy.housekeeping, log=Path("/dev/null"))
    )


def count_free_pages(world: World) -> int:
    """Of all pools."""
    return sum(pool.free for pool in all_read(survey_pools(world.host)))


def test_a_guest_outlives_the_one_who_started_it(world: World) -> None:
    again = FakeHypervisor(FakeRoot(world.host.path))
    assert again.running_names() == {"guest0"}
    assert again.read_guest("guest0") == world.hypervisor.read_guest("guest0")
    assert not again.is_paused(plan_of(world).uuid)


def test_a_start_is_told_from_another(world: World) -> None:
    plan, before = plan_of(world), world.hypervisor.lives()
    assert FakeHypervisor(FakeRoot(world.host.path)).lives() == before
    pid = world.hypervisor.read_guest("guest0").pid
    world.hypervisor.end("guest0")
    start(world, plan)
    (old,), (new,) = before, world.hypervisor.lives()
    assert world.hypervisor.read_guest("guest0").pid == pid
    assert (old.name, old.uuid) == (new.name, new.uuid)
    assert old.start < new.start


def test_a_guest_takes_its_pages_and_gives_them_back(world: World) -> None:
    taken = count_free_pages(world)
    world.hypervisor.end("guest0")
    assert count_free_pages(world) - taken == 32
    assert world.hypervisor.running_names() == frozenset()
    with pytest.raises(NotFound):
        world.hypervisor.read_guest("guest0")


def test_a_guest_that_has_ended_may_be_ended_again(world: World) -> None:
    uuid = world.hypervisor.end("guest0", EndCause.POWERED_OFF)
    world.hypervisor.destroy(uuid)
    world.hypervisor.shutdown(uuid)
    assert not world.hypervisor.is_paused(uuid)


def test_two_guests_share_nothing(world: World) -> None:
    with pytest.raises(HypervisorError, match=r"CPUs .* are in use by guest0; vf .* is in use by guest0; mac .* by guest0"):
        start(world, replace(plan_of(world), name="guest1", uuid=uuid4()))
    assert len(world.host.violations()) == 3
    assert world.hypervisor.running_names() == {"guest0"}


def test_a_vf_that_is_not_handed_over_cannot_be_had(world: World) -> None:
    plan = plan_of(world)
    vfs = {name for name in world.host.names(DEVICES) if world.host.exists(f"{DEVICES}/{name}/physfn")}
    vf = replace(plan.vf, address=PciAddress.parse(max(vfs - {str(plan.vf.address)})))
    with pytest.raises(HypervisorError, match="not bound to vfio-pci"):
        start(world, replace(plan, name="guest1", uuid=uuid4(), cores=(CpuSet.of([14, 15]),), nics=(vf,)))
    assert world.host.violations() == []


def test_pages_that_are_not_there_cannot_be_had(world: World) -> None:
    plan = plan_of(world)
    world.hypervisor.end("guest0")
    with pytest.raises(HypervisorError, match="cannot allocate memory"):
        start(world, replace(plan, pages=1_000_000))
    assert world.host.violations()
    assert world.hypervisor.running_names() == frozenset()


def test_a_guest_must_not_run_unconfined(world: World) -> None:
    plan = plan_of(world)
    world.hypervisor.end("guest0")
    start(world, plan)
    assert world.hypervisor.paused() == {"guest0"}
    world.hypervisor.resume(plan.uuid)
    assert world.hypervisor.paused() == frozenset()
    assert "not its own" in "".join(world.host.violations())


def test_a_host_that_is_not_prepared_is_noticed(world: World) -> None:
    plan = plan_of(world)
    world.hypervisor.end("guest0")
    world.host.sched_setaffinity(11, CpuSet.of(plan.cpus))
    with pytest.raises(HypervisorError, match="the kernel thread kswapd0"):
        start(world, plan)


def test_a_vf_in_use_must_not_be_touched(world: World) -> None:
    vf = plan_of(world).vf
    world.host.write(f"{DEVICES}/{vf.address}/reset", "1")
    world.host.net.enforce_vf(vf.interface, VfState(vf.index))
    world.host.write("sys/bus/pci/drivers/vfio-pci/unbind", str(vf.address))
    assert len(world.host.violations()) == 3


def test_ends_are_told(world: World) -> None:
    told: list[EndCause] = []
    heard = threading.Event()

    def hear(_uuid: object, end: EndCause) -> None:
        told.append(end)
        heard.set()

    world.hypervisor.watch_ends(hear)
    world.hypervisor.deaf.add("guest0")
    uuid = plan_of(world).uuid
    world.hypervisor.shutdown(uuid)
    assert world.hypervisor.running_names() == {"guest0"}
    world.hypervisor.destroy(uuid)
    assert heard.wait(30)
    assert told == [EndCause.DESTROYED]
