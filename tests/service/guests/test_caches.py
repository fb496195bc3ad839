"""Guests with a part of the caches of their own."""

from __future__ import annotations

import errno
from dataclasses import replace
from uuid import uuid4

import pytest

from orchestrator.errors import NotFound, OrchestratorError, RequestError
from orchestrator.guests.service import GuestService
from orchestrator.host.cache import find_group, make_group, read_caches, set_limits
from orchestrator.ledger import EventKind, Ledger
from orchestrator.model.access import OPERATOR
from orchestrator.values import CpuSet
from tests.fakes import resctrl
from tests.harness.crash import World
from tests.harness.guests import create

CACHES = {0: "0-3", 1: "4-7"}
GROUP = "nohype-web"


@pytest.fixture
def limited(world: World) -> World:
    resctrl.add_caches(world.host, CACHES)
    resctrl.mount(world.host, CACHES)
    return world


def default_masks(world: World) -> list[int | None]:
    return [read_caches(world.host).groups[0].find("L3", id) for id in CACHES]


def test_guest_has_its_ways_from_start_to_end(limited: World, manager: GuestService) -> None:
    before = limited.host.tree()
    plan = create(manager, cache_ways=4, bandwidth="40%")
    assert plan.caches
    (share,) = plan.caches.shares
    group = find_group(limited.host, GROUP)
    assert group
    assert (group.find("L3", share.id), group.find("MB", share.id), group.cpus.ids) == (0xF00, 40, frozenset(plan.cpus))
    assert sorted(mask or 0 for mask in default_masks(limited)) == [0x0FF, 0xFFF]
    manager.delete(OPERATOR, "web")
    after = limited.host.tree()
    assert {name: text for name, text in after.items() if name.startswith("sys/fs")} == {
        name: text for name, text in before.items() if name.startswith("sys/fs")
    }


def test_ways_stay_with_a_stopped_guest(limited: World, manager: GuestService) -> None:
    plan = create(manager, cache_ways=4)
    manager.stop(OPERATOR, "web", 1)
    assert find_group(limited.host, GROUP) is None
    other = create(manager, name="other", cache_ways=4)
    assert plan.caches
    assert other.caches
    assert not set(plan.caches.keys) & set(other.caches.keys)
    manager.start(OPERATOR, "web")
    group = find_group(limited.host, GROUP)
    assert group
    assert group.find("L3", plan.caches.shares[0].id) == plan.caches.shares[0].mask


def test_default_group_gets_its_ways_back_after_the_last_guest(limited: World, manager: GuestService) -> None:
    for name in ("one", "two", "three"):
        create(manager, name=name, cache_ways=3)
    for name in ("two", "one", "three"):
        assert default_masks(limited) != [0xFFF, 0xFFF]
        manager.delete(OPERATOR, name)
    assert default_masks(limited) == [0xFFF, 0xFFF]


def test_ways_that_another_program_has_taken_meanwhile_stay_its_own(
    limited: World, manager: GuestService, ledger: Ledger
) -> None:
    plan = create(manager, cache_ways=4)
    assert plan.caches
    (share,) = plan.caches.shares
    make_group(limited.host, "db")
    set_limits(limited.host, "db", {"L3": {0: 0xC00, 1: 0xC00}})
    limited.host.add("sys/fs/resctrl/db/tasks", "4711")
    manager.delete(OPERATOR, "web")
    assert read_caches(limited.host).groups[0].find("L3", share.id) == 0x3FF
    (event,) = [event for event in ledger.events() if event.kind == EventKind.NOT_RESTORED]
    assert event.detail == f"default control group: L3 {share.id}: 0x3ff and not 0xfff, as other groups have ways"


@pytest.mark.parametrize(("wanted", "left"), [(0x00F, 0x00F), (0x03F, 0x03F), (0xFFF, 0xFFF), (0x1FF, 0xFFF)])
def test_default_group_that_another_program_has_set_stays(limited: World, manager: GuestService, wanted: int, left: int) -> None:
    """0xfff is also what a reboot sets. Ways beside those that the guest had are given back."""
    plan = create(manager, cache_ways=4)
    assert plan.caches
    (share,) = plan.caches.shares
    set_limits(limited.host, "", {"L3": {share.id: wanted}})
    manager.delete(OPERATOR, "web")
    assert read_caches(limited.host).groups[0].find("L3", share.id) == left


def test_cpus_of_another_program_stay_in_its_group(limited: World, manager: GuestService) -> None:
    make_group(limited.host, "db")
    limited.host.write("sys/fs/resctrl/db/cpus_list", "2-7\n")
    with pytest.raises(OrchestratorError, match="are in the control group db of another program"):
        create(manager, bandwidth="40%")
    group = find_group(limited.host, "db")
    assert group
    assert str(group.cpus) == "2-7"
    assert find_group(limited.host, GROUP) is None


def test_ways_that_the_default_group_always_shared_come_back_too(limited: World, manager: GuestService) -> None:
    make_group(limited.host, "db")
    set_limits(limited.host, "db", {"L3": {0: 0x00F, 1: 0x00F}})
    limited.host.add("sys/fs/resctrl/db/tasks", "4711")
    create(manager, cache_ways=4)
    assert sorted(mask or 0 for mask in default_masks(limited)) == [0x0FF, 0xFFF]
    manager.delete(OPERATOR, "web")
    assert default_masks(limited) == [0xFFF, 0xFFF]


def test_change_by_another_program_is_drift(limited: World, manager: GuestService, ledger: Ledger) -> None:
    plan = create(manager, cache_ways=4)
    assert plan.caches
    limited.host.write(f"sys/fs/resctrl/{GROUP}/schemata", f"L3:{plan.caches.shares[0].id}=1\n")
    manager.reconciler.detect_drift()
    (event,) = [event for event in ledger.events() if event.kind == EventKind.DRIFTED]
    assert f"control group {GROUP}: L3 {plan.caches.shares[0].id} is 0x1, expected 0xf00" in event.detail


def test_limit_in_another_unit_is_not_applied(limited: World, manager: GuestService, ledger: Ledger) -> None:
    """40% must not become 40 MB/s when resctrl is mounted with mba_MBps."""
    create(manager, bandwidth="40%")
    limited.host.add("proc/self/mounts", "resctrl /sys/fs/resctrl resctrl rw,mba_MBps 0 0")
    manager.reconciler.detect_drift()
    (event,) = [event for event in ledger.events() if event.kind == EventKind.DRIFTED]
    assert "planned in percent, but this host limits it in MB/s now" in event.detail
    manager.stop(OPERATOR, "web", 1)
    with pytest.raises(OrchestratorError, match="planned in percent"):
        manager.start(OPERATOR, "web")
    assert find_group(limited.host, GROUP) is None


def test_pinning_is_restored_though_the_caches_cannot_be_read(limited: World, manager: GuestService, ledger: Ledger) -> None:
    plan = create(manager, cache_ways=4)
    before = limited.hypervisor.read_pinning(plan.uuid)
    limited.hypervisor.pin(plan.uuid, 0, CpuSet.parse("0"))
    limited.host.read_errors[f"sys/fs/resctrl/{GROUP}/schemata"] = errno.EIO
    manager.reconciler.detect_drift()
    (event,) = [event for event in ledger.events() if event.kind == EventKind.DRIFTED]
    assert f"cannot read /sys/fs/resctrl/{GROUP}/schemata" in event.detail
    assert limited.hypervisor.read_pinning(plan.uuid) == before


def test_too_few_ways_that_other_programs_have_left_do_not_stop_the_cleanup(
    world: World, manager: GuestService, ledger: Ledger
) -> None:
    resctrl.add_caches(world.host, CACHES)
    resctrl.mount(world.host, CACHES, minimum=2)
    create(manager, cache_ways=4)
    before = default_masks(world)
    make_group(world.host, "db")
    set_limits(world.host, "db", {"L3": {0: 0x7FF, 1: 0x7FF}})
    world.host.add("sys/fs/resctrl/db/tasks", "4711")
    manager.delete(OPERATOR, "web")
    assert default_masks(world) == before
    assert "cache-default" not in {record.action for record in ledger.undo_records("host")}


@pytest.mark.parametrize(
    "broken", [f"sys/fs/resctrl/{GROUP}/cpus_list", f"sys/fs/resctrl/{GROUP}/schemata", "sys/fs/resctrl/schemata"]
)
def test_start_that_fails_leaves_nothing(limited: World, manager: GuestService, ledger: Ledger, broken: str) -> None:
    limited.host.write_errors[broken] = errno.EIO
    with pytest.raises(OrchestratorError):
        create(manager, cache_ways=4)
    limited.host.write_errors.clear()
    assert ledger.read().claims == ()
    assert default_masks(limited) == [0xFFF, 0xFFF]
    assert find_group(limited.host, GROUP) is None


def test_host_without_resctrl_refuses_and_accepts(world: World, manager: GuestService) -> None:
    with pytest.raises(RequestError, match=r"cannot limit what guest 'web' requests: .*/sys/fs/resctrl does not exist"):
        create(manager, cache_ways=4)
    plan = create(manager, cache_ways=4, accept=["shared-cache"])
    assert plan.caches
    assert plan.caches.waived
    assert not world.host.exists("sys/fs/resctrl")


def test_plan_of_an_earlier_version_has_no_caches(limited: World, manager: GuestService) -> None:
    plan = create(manager)
    assert replace(plan, caches=None) == plan


def test_record_of_an_unknown_guest_is_an_error_and_not_the_record_of_no_request(manager: GuestService) -> None:
    """Or the audit would pass a guest of whose request it knows nothing."""
    assert manager.records.caches(create(manager, name="plain").uuid) is None
    with pytest.raises(NotFound, match="no record of what the guest requested"):
        manager.records.caches(uuid4())
