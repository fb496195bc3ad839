"""Servers with something odd that is not the manager's: it is named and left alone, and stops nothing that does not need it."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import HostError, NoRoom
from orchestrator.guests import allocate
from orchestrator.host.irqs import read_irq
from orchestrator.model.access import OPERATOR
from orchestrator.model.plan import Plan
from orchestrator.resources.cores import MoveIrq
from orchestrator.values import CpuSet
from tests.fakes.domains import add_thread
from tests.fakes.root import FakeRoot
from tests.fakes.server import Server
from tests.harness.crash import World
from tests.harness.guests import ask, create, open_manager, warned

SERVER = Server(cores=8, nodes=2, vfs=7, pages=512)
CPU = "sys/devices/system/cpu"
POOL = "sys/kernel/mm/hugepages/hugepages-2048kB"
KTHREAD = 0x0020_0000  # PF_KTHREAD


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world", SERVER)


def add_irq(world: World, number: int, name: str) -> str:
    world.host.add(f"sys/kernel/irq/{number}/actions", name)
    world.host.add(f"proc/irq/{number}/smp_affinity_list", "0-15")
    return f"proc/irq/{number}/smp_affinity_list"


# Interrupts and threads.


@pytest.mark.parametrize("number", ["ENOSPC", "EINVAL", "EBUSY", "ENODEV"])
def test_an_interrupt_that_cannot_be_moved_is_named_once(world: World, number: str) -> None:
    world.host.write_errors[add_irq(world, 90, "nic1-TxRx-63")] = getattr(errno, number)
    manager = open_manager(world)
    create(manager, name="one")
    (said,) = warned(manager)
    assert said.startswith("not moved off the guest cores: nic1-TxRx-63: cannot set the affinity of interrupt 90 to CPUs 0-1")
    manager.delete(OPERATOR, "one")
    assert world.count_undo_records() == 0
    create(manager, name="two")
    assert len(warned(manager)) == 1, "it has not changed"
    assert str(read_irq(world.host, 0).affinity) == "0-1", "the others are moved"  # type: ignore[union-attr]


@pytest.mark.parametrize("number", ["EIO", "EPERM"])
def test_an_interrupt_that_the_kernel_manages_is_no_trouble(world: World, number: str) -> None:
    world.host.write_errors[add_irq(world, 90, "nvme9q1")] = getattr(errno, number)
    manager = open_manager(world)
    create(manager)
    assert warned(manager) == []


def test_an_interrupt_that_cannot_be_read_is_named(world: World) -> None:
    world.host.read_errors[add_irq(world, 90, "odd")] = errno.EIO
    add_irq(world, 91, "strange")
    world.host.add("proc/irq/91/smp_affinity_list", "all of them")
    manager = open_manager(world)
    create(manager)
    (said,) = warned(manager)
    assert "interrupt 90" in said
    assert "interrupt 91 (strange): 'all of them' is not a list of CPUs" in said


def test_interrupts_that_nobody_may_see_stop_nothing(world: World) -> None:
    """In a container /proc/irq may be hidden."""
    (world.host.path / "proc/irq").rename(world.host.path / "hidden")
    manager = open_manager(world)
    create(manager)
    assert warned(manager)[0].startswith("not moved off the guest cores: interrupts: cannot list /proc/irq")
    assert "Cpus_allowed_list:\t0-1" in world.host.text("proc/11/task/11/status"), "threads are moved"


def test_nothing_is_written_to_learn_what_was_before(world: World) -> None:
    """The undo record must be on disk before anything of the host is written."""
    add_irq(world, 90, "nic1")
    step = MoveIrq(90, "nic1", CpuSet.of([0, 1]))
    before = len(world.host.writes)
    assert step.read_before(world.host) == {"number": 90, "name": "nic1", "cpus": "0-15"}
    assert len(world.host.writes) == before
    assert MoveIrq(90, "nvme", CpuSet.of([0, 1])).read_before(world.host) is None, "its number is another's now"


@pytest.mark.parametrize("number", ["EINVAL", "EPERM"])
def test_a_thread_that_refuses_is_named_and_the_others_are_moved(world: World, number: str) -> None:
    add_thread(world.host, 900, 900, "rebel", "0-15", flags=KTHREAD)
    world.host.write_errors["affinity of 900"] = getattr(errno, number)
    manager = open_manager(world)
    create(manager)
    (said,) = warned(manager)
    assert "rebel: cannot confine thread 900 to CPUs 0-1" in said
    assert "Cpus_allowed_list:\t0-1" in world.host.text("proc/11/task/11/status")


def test_a_program_that_is_pinned_to_guest_cores_is_named_and_left_alone(world: World) -> None:
    add_thread(world.host, 900, 900, "dpdk", "0-1")
    add_thread(world.host, 900, 901, "dpdk-worker", "6")
    add_thread(world.host, 910, 910, "service", "0-1")
    add_thread(world.host, 920, 920, "anywhere", "0-15")
    add_thread(world.host, 930, 930, "qemu", "8", group="/machine.slice/machine-qemu-db.scope")
    manager = open_manager(world)
    create(manager)
    assert warned(manager) == [
        "not moved off the guest cores: process 900 (dpdk-worker) is pinned to CPUs 6; the manager does not move programs"
    ]
    assert "Cpus_allowed_list:\t6" in world.host.text("proc/900/task/901/status")


def test_a_thread_that_ends_meanwhile_is_no_trouble(world: World) -> None:
    add_thread(world.host, 900, 900, "brief", "0-15", flags=KTHREAD)
    world.host.write_errors["affinity of 900"] = errno.ESRCH
    manager = open_manager(world)
    create(manager)
    assert warned(manager) == []


def test_a_thread_that_cannot_be_read_is_named(world: World) -> None:
    add_thread(world.host, 900, 900, "hidden", "0-15")
    world.host.read_errors["proc/900/task/900/status"] = errno.EACCES
    add_thread(world.host, 901, 901, "odd", "0-15")
    world.host.add("proc/901/task/901/stat", "901 (odd) S 1")
    manager = open_manager(world)
    create(manager)
    (said,) = warned(manager)
    assert "/proc/900/task/900/status" in said
    assert "cannot parse /proc/901/task/901/stat or status" in said


# CPUs.


def switch_off(world: World, off: str) -> None:
    online = SERVER.cpus - CpuSet.parse(off)
    world.host.add(f"{CPU}/online", str(online))
    for cpu in online:
        siblings = CpuSet.parse(world.host.text(f"{CPU}/cpu{cpu}/topology/core_cpus_list"))
        world.host.add(f"{CPU}/cpu{cpu}/topology/core_cpus_list", str(siblings & online))


def test_a_host_whose_smt_was_switched_off_goes_on_with_what_is_online(world: World) -> None:
    switch_off(world, "1,3,5,7,9,11,13,15")
    manager = open_manager(world)
    _, warnings = ask(manager)
    assert "housekeeping CPUs 1 are offline: 0 are used" in warnings
    create(manager)
    assert str(world.hypervisor.read_guest("web").emulator_pin) == "0"
    assert warned(manager) == ["configuration and host: housekeeping CPUs 1 are offline: 0 are used"]
    manager.reconciler.detect_drift()
    assert "drifted" not in [event.kind for event in manager.events(OPERATOR)]


def test_a_housekeeping_cpu_that_goes_off_line_meanwhile_stops_neither_guests_nor_their_undoing(world: World) -> None:
    manager = open_manager(world)
    create(manager)
    switch_off(world, "1")
    create(manager, name="next")
    for name in ("web", "next"):
        manager.delete(OPERATOR, name)
    assert world.count_undo_records() == 0


def test_a_guest_whose_cpus_have_gone_off_line_is_named(world: World) -> None:
    manager = open_manager(world)
    create(manager, name="runs")
    create(manager)
    manager.stop(OPERATOR, "web", 0)
    switch_off(world, "2-3,5")
    with pytest.raises(HostError, match="guest web: CPUs 5 are offline") as caught:
        manager.start(OPERATOR, "web")
    assert "set them online" in caught.value.hint
    for _ in range(2):
        manager.reconciler.detect_drift()
    said = [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"]
    assert said == ["CPUs 2-3 are offline"]
    world.host.add(f"{CPU}/online", str(SERVER.cpus))
    manager.start(OPERATOR, "web")
    manager.reconciler.detect_drift()
    assert manager.events(OPERATOR)[-1].detail == "no differences remain"


@pytest.mark.parametrize(("housekeeping", "said"), [("64-65", "CPUs 64-65 do not exist"), ("0-1,64", "CPUs 64 do not exist")])
def test_housekeeping_cpus_of_another_host_are_refused_and_named(world: World, housekeeping: str, said: str) -> None:
    manager = open_manager(world, replace(SERVER.policy, housekeeping=CpuSet.parse(housekeeping)))
    with pytest.raises(NoRoom) as caught:
        ask(manager)
    assert said in caught.value.reasons[0]
    assert said in str(manager.compare(manager.survey()))
    assert said in warned(manager)[0]


def test_a_cpu_without_topology_is_left_out_and_named(world: World) -> None:
    (world.host.path / f"{CPU}/cpu5/topology/core_cpus_list").unlink()
    world.host.add(f"{CPU}/cpu4/topology/core_cpus_list", "4")
    world.host.add(f"{CPU}/cpu6/topology/physical_package_id", "none")
    manager = open_manager(world)
    _, warnings = ask(manager)
    assert "cpu5/topology/core_cpus_list" in str(warnings)
    assert "cannot parse /sys/devices/system/cpu/cpu6/topology" in str(warnings)
    assert create(manager).cores == (CpuSet.parse("2-3"),)


def test_a_host_without_kvm_is_refused_before_anything_is_done(world: World) -> None:
    (world.host.path / "sys/class/misc/kvm/dev").unlink()
    (world.host.path / "sys/class/misc/kvm").rmdir()
    manager = open_manager(world)
    with pytest.raises(NoRoom, match="the kernel offers no KVM"):
        create(manager)
    assert not manager.survey().kvm


# Huge pages.


def reserve(world: World, count: int) -> None:
    world.host.add(f"{POOL}/resv_hugepages", str(count))


def test_pages_that_programs_have_reserved_are_not_promised(world: World) -> None:
    """Known for the machine only: 1024 are free on two nodes."""
    manager = open_manager(world)
    reserve(world, 900)
    with pytest.raises(NoRoom) as caught:
        ask(manager, memory="256M")
    said = "124 of 512 huge pages of 2M are free, 128 requested (the pool shows 512 as free; programs have reserved 900"
    assert said in str(caught.value.reasons)
    assert ask(manager, memory="248M")[0].pages == 124
    reserve(world, 400)
    assert ask(manager, memory="512M")[0].pages == 256, "the other node's pages are enough for those programs"


def test_reserved_pages_and_those_of_stopped_guests_add_up(world: World) -> None:
    manager = open_manager(world)
    create(manager, memory="512M")
    manager.stop(OPERATOR, "web", 0)
    reserve(world, 700)
    with pytest.raises(NoRoom):
        ask(manager, memory="256M")
    ask(manager, memory="128M")


def test_what_a_guest_that_is_being_started_has_reserved_counts_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU reserves its pages before it takes them."""
    manager, start = open_manager(world), world.hypervisor.create_paused
    found: list[Plan] = []

    def start_slowly(xml: str) -> None:
        reserve(world, 512)
        found.append(ask(manager, memory="1G")[0])
        reserve(world, 0)
        start(xml)

    monkeypatch.setattr(world.hypervisor, "create_paused", start_slowly)
    create(manager, memory="1G")
    assert [plan.pages for plan in found] == [512]


def test_a_pool_that_cannot_be_read_is_left_out_and_named(world: World) -> None:
    pool = "sys/devices/system/node/node{}/hugepages/hugepages-2048kB"
    world.host.read_errors[pool.format(0) + "/nr_hugepages"] = errno.EIO
    world.host.add(pool.format(1).replace("2048", "1048576") + "/free_hugepages", "some")
    manager = open_manager(world)
    plan, warnings = ask(manager)
    assert plan.node == 1
    assert "node0/hugepages/hugepages-2048kB/nr_hugepages" in str(warnings)
    assert "free_hugepages: 'some' is not a number" in str(warnings)


def age_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the survey counts as older than what plans are made on."""
    monkeypatch.setattr(allocate, "SURVEY_MAX_AGE", 0.0)


@pytest.mark.parametrize("gone", [False, True])
def test_a_pool_that_goes_bad_later_concerns_its_own_node_only(world: World, gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory is taken out of a node while the manager runs."""
    manager, pool = open_manager(world), "sys/devices/system/node/node1/hugepages/hugepages-2048kB"
    create(manager, name="runs")
    create(manager, name="stopped", placement={"cpus": "8-9"})
    manager.stop(OPERATOR, "stopped", 0)
    if gone:
        (world.host.path / pool).rename(world.host.path / "elsewhere")
    else:
        world.host.read_errors[f"{pool}/free_hugepages"] = errno.EIO
    assert ask(manager)[0].node == 0
    age_survey(monkeypatch)
    plan, warnings = ask(manager)
    assert plan.node == 0
    assert gone or "node1/hugepages/hugepages-2048kB/free_hugepages" in str(warnings)
    create(manager)
    manager.reconciler.detect_drift()
    (drifted,) = [event.detail for event in manager.events(OPERATOR) if event.kind == "drifted"]
    assert "node 1: 0 huge pages of 2M are free, but stopped guests own 32" in drifted
    for name in ("runs", "web"):
        manager.delete(OPERATOR, name)
    assert manager.quarantined(OPERATOR) == ()


@pytest.mark.parametrize(
    "name",
    [f"{CPU}/isolated", f"{CPU}/possible", f"{CPU}/modalias", "sys/fs/cgroup/cpuset.cpus.isolated", f"{POOL}/resv_hugepages"],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_of_the_host_cannot_be_read_is_named_and_planning_goes_on(
    world: World, name: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not world.host.exists(name):
        world.host.add(name, "0")
    manager = open_manager(world)
    if late:
        ask(manager)
        age_survey(monkeypatch)
    world.host.read_errors[name] = errno.EIO
    _, warnings = ask(manager)
    assert (late and name in (f"{CPU}/possible", f"{CPU}/modalias")) or name in str(warnings)
    create(manager)
    assert any(name in problem for problem in manager.survey().problems)


def test_a_count_of_promised_pages_that_is_no_number_is_named(world: World) -> None:
    world.host.add(f"{POOL}/resv_hugepages", "some")
    manager = open_manager(world)
    assert "resv_hugepages: 'some' is not a number" in str(ask(manager)[1])


@pytest.mark.parametrize("text", ["all", ""])
def test_an_interrupt_that_reads_back_oddly_stops_no_guest(world: World, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, read = add_irq(world, 90, "nic9"), FakeRoot.read_bytes

    def read_oddly(host: FakeRoot, wanted: str) -> bytes:
        written = any(change[0] == name for change in host.writes)
        return text.encode() if wanted == name and written else read(host, wanted)

    monkeypatch.setattr(FakeRoot, "read_bytes", read_oddly)
    manager = open_manager(world)
    create(manager)
    assert "nic9: " in warned(manager)[0]


def test_a_control_group_that_reads_oddly_is_the_hosts_fault(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read = FakeRoot.read_bytes
    monkeypatch.setattr(
        FakeRoot, "read_bytes", lambda host, name: b"all" if name.endswith("cpus.effective") else read(host, name)
    )
    with pytest.raises(HostError, match=r"cannot parse /.*web.scope/cpuset.cpus.effective: 'all'"):
        create(open_manager(world))


def test_a_node_that_vanishes_while_it_is_read_is_named(world: World) -> None:
    folder = world.host.path / "sys/devices/system/node/node1/hugepages"
    folder.rename(world.host.path / "elsewhere")
    folder.write_text("")
    plan, warnings = ask(open_manager(world))
    assert plan.node == 0
    assert "cannot list /sys/devices/system/node/node1/hugepages" in str(warnings)


def test_a_host_whose_vfio_pci_is_not_loaded_says_so_before_a_guest_is_made(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = open_manager(world)
    assert manager.compare(manager.survey()) == ()
    driver = world.host.path / "sys/bus/pci/drivers/vfio-pci"
    driver.rename(world.host.path / "elsewhere")
    age_survey(monkeypatch)
    assert "the driver vfio-pci is not loaded" in str(ask(manager)[1])
    assert "the driver vfio-pci is not loaded" in str(manager.compare(manager.survey()))


def test_a_start_on_a_card_that_was_taken_out_names_the_card(world: World) -> None:
    manager = open_manager(world)
    pf = create(manager).vf.pf
    manager.stop(OPERATOR, "web", 0)
    (world.host.path / f"sys/bus/pci/devices/{pf}").unlink()
    with pytest.raises(HostError, match=f"{pf} is not an SR-IOV physical function"):
        manager.start(OPERATOR, "web")


def test_no_guest_is_placed_on_cpus_that_have_gone_off_line_since_the_survey(world: World) -> None:
    manager = open_manager(world)
    create(manager, name="first")
    assert str(ask(manager)[0].cores[0]) == "4-5"
    switch_off(world, "4-5")
    assert str(ask(manager)[0].cores[0]) == "6-7"
    create(manager)
