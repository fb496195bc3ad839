"""Which of the cores that would do a guest gets, of what pages, and given placements."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.config import read_config
from orchestrator.errors import NoRoom, RequestError
from orchestrator.model.plan import Allocated, AllocatedPages, Plan, Policy
from orchestrator.model.request import GuestRequest, parse_guest_request
from orchestrator.model.topology import Core, IommuGroup, PagePool, PhysicalFunction, Topology, VirtualFunction
from orchestrator.planning.planner import plan_guest
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

M2, G1 = Size.parse("2M"), Size.parse("1G")
POLICY = Policy(CpuSet.parse("0-1"), ("nic0",), M2)


def make_nic(name: str, bus: int, node: int | None, *, existing: int = 0) -> PhysicalFunction:
    address = PciAddress(0, bus, 0, 0)
    made = PhysicalFunction(address, name, "8086:10c9", "igb", node, True, MacAddress(f"52:54:00:00:{bus:02x}:00"), 7, 128, 2, ())
    vfs = tuple(VirtualFunction(made.vf_address(index), index, None, 100 + index) for index in range(existing))
    return dataclasses.replace(made, vfs=vfs)


NIC = make_nic("nic0", 0x41, None)


def make_host(nodes: int, cores: int, *, width: int = 2, pfs: tuple[PhysicalFunction, ...] = (NIC,)) -> Topology:
    """Nodes of equally many cores; the first core of the first node is housekeeping."""
    made = tuple(
        Core(CpuSet.of(range(first := (node * cores + number) * width, first + width)), node, node)
        for node in range(nodes)
        for number in range(cores)
    )
    pools = tuple(PagePool(node, size, total, total) for node in range(nodes) for size, total in ((M2, 1024), (G1, 4)))
    vfs = [vf.address for pf in pfs for vf in pf.vfs]
    groups = tuple(IommuGroup(number, "DMA", (address,)) for number, address in enumerate([*vfs, *(pf.address for pf in pfs)]))
    return Topology(made, CpuSet(), pools, pfs, groups)


def wish(**fields: object) -> GuestRequest:
    return parse_guest_request({"name": "g1", "memory": "2G", "image": "minimal", **fields})


def place(topology: Topology, taken: str = "", *, policy: Policy = POLICY, **fields: object) -> Plan:
    return plan_guest(wish(**fields), topology, Allocated(cpus=CpuSet.parse(taken)), policy)


def refusals(
    topology: Topology, claims: Allocated | None = None, *, policy: Policy = POLICY, **fields: object
) -> tuple[str, ...]:
    with pytest.raises(NoRoom) as caught:
        plan_guest(wish(**fields), topology, claims or Allocated(), policy)
    return caught.value.reasons


ONE_NODE = make_host(1, 16, width=1)


@pytest.mark.parametrize(
    ("taken", "cores", "gets"),
    [
        ("", 1, "2"),
        ("4,8", 3, "5-7"),  # free are 2-3, 5-7, 9-15
        ("4,8", 2, "2-3"),
        ("4,8", 1, "2"),
        ("4,8", 4, "9-12"),
        ("4,8", 8, "2,9-15"),  # no run is long enough: the longest whole, the rest from the shortest that will do
        ("4,8", 9, "2-3,9-15"),
        ("4,8", 10, "5-7,9-15"),
        ("4,8", 12, "2-3,5-7,9-15"),
        ("3,5,7,9,11,13,15", 3, "2,4,6"),
        ("7-8,13", 2, "14-15"),
    ],
)
def test_the_smallest_run_that_is_long_enough_else_as_few_as_can_be(taken: str, cores: int, gets: str) -> None:
    assert CpuSet.of(place(ONE_NODE, taken, cores=cores).cpus) == CpuSet.parse(gets)


def test_housekeeping_cores_and_sockets_end_a_run() -> None:
    policy = dataclasses.replace(POLICY, housekeeping=CpuSet.parse("4"))
    assert CpuSet.of(place(ONE_NODE, "7", policy=policy, cores=4).cpus) == CpuSet.parse("0-3")
    # Without NUMA all cores are of node 0; a guest is better off on one socket.
    cores = tuple(dataclasses.replace(core, socket=min(core.cpus.ids) // 8) for core in ONE_NODE.cores)
    assert CpuSet.of(place(dataclasses.replace(ONE_NODE, cores=cores), cores=8).cpus) == CpuSet.parse("8-15")


def test_vcpus_follow_the_order_of_cores_whatever_the_runs() -> None:
    assert place(ONE_NODE, "4,8", cores=8).cpus == (2, 9, 10, 11, 12, 13, 14, 15)


def test_neighbours_are_cores_however_the_threads_are_numbered() -> None:
    cores = tuple(Core(CpuSet.of((number, number + 8)), 0, 0) for number in range(8))
    topology = dataclasses.replace(ONE_NODE, cores=cores)
    policy = dataclasses.replace(POLICY, housekeeping=CpuSet.parse("0,8"))
    assert place(topology, "3,11", policy=policy, cores=3).cpus == (4, 12, 5, 13, 6, 14)


TWO_NODES = make_host(2, 8, width=1)


def test_the_node_with_the_fewest_left_even_if_its_cores_are_scattered() -> None:
    """So that the other stays whole for a guest that needs it."""
    assert CpuSet.of(place(TWO_NODES, "3,5,7", cores=3).cpus) == CpuSet.parse("2,4,6")
    assert place(TWO_NODES, cores=7).node == 1


def test_of_equal_nodes_the_one_with_neighbours_then_that_with_fewer_pages() -> None:
    assert place(TWO_NODES, "3,6,8,9,10,11", cores=3).node == 1
    pools = (PagePool(0, M2, 1024, 1024), PagePool(1, M2, 1024, 1023))
    assert place(dataclasses.replace(TWO_NODES, pools=pools), "8,9", cores=2, memory="2M").node == 1


def test_the_vfs_node_comes_before_all_that() -> None:
    pfs = (make_nic("nic0", 0x41, 1), make_nic("nic1", 0x42, 0))
    topology = make_host(2, 8, width=1, pfs=pfs)
    assert place(topology, cores=2).node == 1
    both = dataclasses.replace(POLICY, uplinks=("nic0", "nic1"))
    # Each node has a VF: the fuller node wins.
    assert (place(topology, cores=2, policy=both).node, place(topology, cores=2, policy=both).vf.interface) == (0, "nic1")
    assert (place(topology, cores=7, policy=both).node, place(topology, cores=7, policy=both).vf.interface) == (1, "nic0")


def test_a_guest_may_ask_for_another_page_size() -> None:
    plan = place(TWO_NODES, page_size="1G")
    assert (plan.page_size, plan.pages, plan.memory) == (G1, 2, Size.parse("2G"))
    assert place(TWO_NODES).page_size == M2
    with pytest.raises(RequestError, match="memory 1025M is not a multiple of the huge page size 1G"):
        place(TWO_NODES, page_size="1G", memory="1025M")
    reasons = refusals(TWO_NODES, page_size="16K")
    assert reasons == tuple(f"node {node}: no huge pages of 16K, only of 2M and 1G" for node in (0, 1))


def test_each_page_size_is_counted_by_itself() -> None:
    taken = Allocated(pages=(AllocatedPages(0, G1, 4, 0), AllocatedPages(1, G1, 3, 3), AllocatedPages(1, M2, 1024, 1024)))
    full_and_claimed = (
        "node 0: 0 of 4 huge pages of 1G are free, 2 requested",
        "node 1: 1 of 4 huge pages of 1G are free, 2 requested",
    )
    assert refusals(TWO_NODES, taken, page_size="1G") == full_and_claimed
    assert plan_guest(wish(), TWO_NODES, taken, POLICY).node == 0


@pytest.mark.parametrize(
    ("free", "owned", "unused", "left"),
    [
        (1024, 0, 0, 924),
        (1000, 0, 0, 924),  # the host's programs use 24 pages of their share of 100
        (900, 0, 0, 900),  # they use more than their share
        (1024, 400, 400, 524),
        (600, 400, 0, 524),  # 24 in use of the share
        (50, 900, 0, 24),
        (24, 1000, 0, 0),  # claimed before the operator has reserved so much
    ],
)
def test_the_hosts_share_of_the_pages(free: int, owned: int, unused: int, left: int) -> None:
    topology = dataclasses.replace(ONE_NODE, pools=(PagePool(0, M2, 1024, free),))
    policy = dataclasses.replace(POLICY, reserved_pages=((M2, 100), (G1, 9)))
    taken = Allocated(pages=(AllocatedPages(0, M2, owned, unused),))
    if left:
        assert plan_guest(wish(memory=f"{2 * left}M"), topology, taken, policy).pages == left
    (reason,) = refusals(topology, taken, policy=policy, memory=f"{2 * left + 2}M")
    assert reason == f"node 0: {left} of 1024 huge pages of 2M are free, {left + 1} requested"


def test_the_share_is_configured(tmp_path: Path) -> None:
    file = tmp_path / "nohype.toml"
    lines = '[host]\nhousekeeping = "0-1"\nuplinks = ["nic0"]\n'
    file.write_text(lines)
    assert read_config(file).host.reserved == ()
    file.write_text(lines + 'reserved_pages = { "2048K" = 64, "1G" = 1 }\n')
    assert read_config(file).host.reserved == ((M2, 64), (G1, 1))
    for wrong in ('{ "2M" = -1 }', '{ "2M" = "64" }', '{ "2M" = true }', '{ "much" = 1 }', "64"):
        file.write_text(f"{lines}reserved_pages = {wrong}\n")
        with pytest.raises(RequestError, match="host.reserved_pages"):
            read_config(file)


SMT = make_host(2, 4, pfs=(make_nic("nic0", 0x41, 0, existing=3), make_nic("nic1", 0x42, 1)))


def given(cpus: str, vf: str | None = None, **fields: object) -> dict[str, object]:
    return {"placement": {"cpus": cpus, **({"vf": vf} if vf else {})}, **fields}


def test_a_given_placement_is_taken_as_it_is() -> None:
    """Even where the planner would have chosen better."""
    plan = place(SMT, "2-3", **given("10-11,14-15", "0000:41:10.4"))
    assert (plan.cpus, plan.node, plan.pages) == ((10, 11, 14, 15), 1, 1024)
    assert (str(plan.vf.address), plan.vf.index, plan.vf.interface) == ("0000:41:10.4", 2, "nic0")
    assert place(SMT, **given("2-3", cores=1, page_size="1G")).pages == 2
    near = dataclasses.replace(POLICY, uplinks=("nic0", "nic1"))
    assert place(SMT, policy=near, **given("10-11")).vf.interface == "nic1"
    assert place(SMT, policy=near, **given("2-3")).vf.interface == "nic0"
    assert str(place(SMT, policy=near, **given("2-3", "0000:42:10.2")).vf.address) == "0000:42:10.2"


@pytest.mark.parametrize(
    ("cpus", "wrong"),
    [
        ("0-1", ["CPUs 0-1 are housekeeping"]),
        ("4-5", ["CPUs 4-5 are owned by guests"]),
        ("3", ["CPUs 3 are not the whole core 2-3"]),
        ("3-4", ["CPUs 3 are not the whole core 2-3", "CPUs 4 are not the whole core 4-5", "CPUs 4 are owned by guests"]),
        ("14-17", ["the host has no CPUs 16-17, or they are offline"]),
        ("99", ["the host has no CPUs 99, or they are offline"]),
        ("6-9", ["CPUs 6-7 are not isolated", "CPUs span several nodes: 6-7 on node 0, 8-9 on node 1"]),
        ("8-9,12", ["cores have different numbers of threads: 1 and 2"]),
        ("0-1,4-5", ["CPUs 0-1 are housekeeping", "CPUs 4-5 are owned by guests"]),
    ],
)
def test_a_given_placement_is_refused_whole_with_all_that_is_wrong(cpus: str, wrong: list[str]) -> None:
    cores = tuple(Core(CpuSet.of([12]), 1, 1) if 12 in core.cpus else core for core in SMT.cores)
    topology = dataclasses.replace(SMT, cores=cores, isolated=CpuSet.parse("2-5,8-15"))
    taken = Allocated(cpus=CpuSet.parse("4-5"))
    assert refusals(topology, taken, **given(cpus)) == tuple(f"placement: {reason}" for reason in wrong)


def test_a_given_placement_needs_pages_too() -> None:
    taken = Allocated(pages=(AllocatedPages(1, M2, 1, 1),))
    assert refusals(SMT, taken, **given("10-11")) == ("node 1: 1023 of 1024 huge pages of 2M are free, 1024 requested",)
    assert len(refusals(SMT, taken, **given("10-11,12", "0000:41:10.6"))) == 3


@pytest.mark.parametrize(
    ("vf", "wrong"),
    [
        ("0000:41:10.0", "VF 0000:41:10.0 is owned by a guest"),
        ("0000:41:10.2", "VF 0000:41:10.2 shares IOMMU group 7 with 0000:03:00.0"),
        ("0000:41:10.6", "VF 0000:41:10.6 is not one of its 3 (of 7 possible) VFs"),  # the fourth is not made, and can't be
        ("0000:42:10.0", "VF 0000:42:10.0 is not one of its 3 (of 7 possible) VFs"),  # of a PF that is no uplink
        ("0000:41:00.0", "VF 0000:41:00.0 is not one of its 3 (of 7 possible) VFs"),
    ],
)
def test_a_given_vf_is_taken_or_refused(vf: str, wrong: str) -> None:
    stranger = IommuGroup(7, "DMA", (PciAddress.parse("0000:41:10.2"), PciAddress.parse("0000:03:00.0")))
    topology = dataclasses.replace(SMT, iommu_groups=(*SMT.iommu_groups, stranger))
    taken = Allocated(vfs=frozenset({PciAddress.parse("0000:41:10.0")}))
    assert refusals(topology, taken, **given("2-3", vf)) == (f"uplink nic0: {wrong}",)


def test_cores_beside_a_placement_must_agree() -> None:
    assert len(place(SMT, **given("2-5")).cores) == 2
    assert len(place(SMT, **given("2-5", cores=2)).cores) == 2
    for cores in (1, 3):
        with pytest.raises(RequestError, match=f"cores is {cores}, but placement.cpus 2-5 are 2 cores") as caught:
            place(SMT, **given("2-5", cores=cores))
        assert caught.value.hint


def test_no_room_says_what_was_asked_for() -> None:
    with pytest.raises(NoRoom, match=r"the cores of CPUs 2, 2 huge pages of 1G, VF 0000:41:10.0\)"):
        place(SMT, **given("2", "41:10.0", page_size="1G"))


@pytest.mark.parametrize(("topoext", "cpus", "features"), [(True, "2-3", ("topoext",)), (True, "12", ()), (False, "2-3", ())])
def test_amds_smt_threads_are_told_to_the_guest(topoext: bool, cpus: str, features: tuple[str, ...]) -> None:
    cores = tuple(Core(CpuSet.of([12]), 1, 1) if 12 in core.cpus else core for core in SMT.cores)
    assert place(dataclasses.replace(SMT, cores=cores, topoext=topoext), **given(cpus)).cpu_features == features
