"""What keeps the host off guest cores: set with the first guest, restored after the last. With and without `isolcpus`."""

from __future__ import annotations

from dataclasses import replace
from errno import EINVAL, EROFS

import pytest

from orchestrator.guests.service import GuestService
from orchestrator.host.isolation import WORKQUEUE
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.values import CpuSet
from tests.harness.crash import World
from tests.harness.guests import create, open_manager, warned

EXCLUSIVE = "sys/fs/cgroup/machine.slice/cpuset.cpus.exclusive"
ISOLATED = ("sys/devices/system/cpu/isolated", "sys/fs/cgroup/cpuset.cpus.isolated")
MASK = f"{WORKQUEUE}/cpumask"


@pytest.fixture
def manager(world: World) -> GuestService:
    """On a host without `isolcpus`."""
    for name in ISOLATED:
        world.host.add(name)
    world.host.add(EXCLUSIVE)
    return open_manager(world, world.server.policy)


def read_partitions(world: World) -> dict[str, str]:
    """State of each group that can be a partition, by its last two names."""
    found = sorted(world.host.path.glob("sys/fs/cgroup/machine.slice/*/libvirt/*/cpuset.cpus.partition"))
    return {f"{path.parts[-4].removeprefix('machine-qemu-')}/{path.parts[-2]}": path.read_text().strip() for path in found}


def test_settings_hold_while_there_are_guests(world: World) -> None:
    manager = open_manager(world, world.server.policy)
    before = world.host.text(MASK)
    create(manager)
    create(manager, name="two")
    housekeeping = world.server.policy.housekeeping
    assert CpuSet.parse_mask(world.host.text(MASK)) == housekeeping
    assert CpuSet.parse(world.host.text("proc/sys/kernel/watchdog_cpumask")) == housekeeping
    manager.delete(OPERATOR, "web")
    assert CpuSet.parse_mask(world.host.text(MASK)) == housekeeping
    manager.delete(OPERATOR, "two")
    assert world.host.text(MASK) == before


@pytest.mark.parametrize("guests", [0, 1])
def test_settings_hold_for_guests_of_an_earlier_manager(world: World, guests: int) -> None:
    """As after an update from a version that did not set them."""
    manager, before = open_manager(world, world.server.policy), world.host.text(MASK)
    for _ in range(guests):
        create(manager)
    manager.close()
    world.host.add(MASK, before)
    again = open_manager(world, world.server.policy)
    housekeeping = world.server.policy.housekeeping
    assert (CpuSet.parse_mask(world.host.text(MASK)) == housekeeping) is bool(guests)
    for _ in range(guests):
        again.delete(OPERATOR, "web")
    assert world.host.text(MASK) == before
    again.close()


def test_read_only_setting_is_an_event_and_the_guest_runs(world: World) -> None:
    manager = open_manager(world, world.server.policy)
    world.host.write_errors[MASK] = EROFS
    create(manager)
    assert any(MASK in text and "ReadWritePaths" in text for text in warned(manager))


def test_vcpus_become_partitions_where_the_host_did_not_isolate_them(world: World, manager: GuestService) -> None:
    plan = create(manager)
    partitions = read_partitions(world)
    vcpus = {f"web.scope/vcpu{index}" for index in range(len(plan.cpus))}
    assert {name for name, state in partitions.items() if state == "isolated"} == vcpus
    assert CpuSet.parse(world.host.text(EXCLUSIVE)) == CpuSet.of(plan.cpus)
    assert not any("not isolated" in text for text in warned(manager))
    assert CpuSet.parse(world.host.text(ISOLATED[1])) == CpuSet.of(plan.cpus)
    other = create(manager, name="two")
    assert CpuSet.parse(world.host.text(EXCLUSIVE)) == CpuSet.of((*plan.cpus, *other.cpus))
    manager.delete(OPERATOR, "two")
    manager.delete(OPERATOR, "web")
    assert world.host.text(EXCLUSIVE) == ""
    assert world.host.violations() == []


@pytest.mark.parametrize("order", [("web", "two"), ("two", "web")])
def test_group_of_machines_that_was_made_anew_is_restored(
    world: World, manager: GuestService, ledger: Ledger, order: tuple[str, str]
) -> None:
    """systemd removes it with its last scope, and another program's guest may hold it when the manager restores it."""
    for name in ("web", "two"):
        create(manager, name=name)
    for name in ("web", "two"):
        manager.stop(OPERATOR, name, 0)
    for name in order:
        world.host.add(EXCLUSIVE)
        manager.start(OPERATOR, name)
    for name in ("web", "two"):
        manager.delete(OPERATOR, name)
    assert world.host.text(EXCLUSIVE) == ""
    assert [event.detail for event in ledger.events() if event.kind == EventKind.NOT_RESTORED] == []


def test_exclusive_cpus_of_another_program_stay(world: World, manager: GuestService) -> None:
    world.host.add(EXCLUSIVE, "0")
    plan = create(manager)
    assert CpuSet.parse(world.host.text(EXCLUSIVE)) == CpuSet.of((0, *plan.cpus))
    world.host.add(EXCLUSIVE, str(CpuSet.of((0, 1, *plan.cpus))))
    manager.delete(OPERATOR, "web")
    assert world.host.text(EXCLUSIVE) == "0-1"


@pytest.mark.parametrize("shared", [True, False])
def test_vcpus_without_groups_of_their_own_are_an_event(world: World, manager: GuestService, shared: bool) -> None:
    """A partition of one CPU for all threads of QEMU would stop the guest."""
    plan, scope = create(manager), "machine.slice/other.scope"
    world.host.writes.clear()
    manager.host_setup.isolate(replace(plan, cores=(CpuSet.parse("8-9"),)), scope, {scope: CpuSet.of([9])} if shared else {})
    assert world.host.writes == []
    assert any(f"its 2 vCPUs have {int(shared)} control groups" in text for text in warned(manager))


def test_host_with_isolcpus_gets_no_partitions(world: World) -> None:
    manager = open_manager(world, world.server.policy)
    create(manager)
    assert set(read_partitions(world).values()) == {"member"}


@pytest.mark.parametrize("kind", ["kernel", "refused"])
def test_partition_that_cannot_be_made_is_an_event_and_the_guest_runs(world: World, manager: GuestService, kind: str) -> None:
    if kind == "kernel":
        (world.host.path / EXCLUSIVE).unlink()
    else:
        world.host.write_errors[EXCLUSIVE] = EINVAL
    create(manager)
    assert any("not isolated from the scheduler's load balancing" in text for text in warned(manager))
    manager.delete(OPERATOR, "web")
