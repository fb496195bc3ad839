"""Planning: what a guest gets, and why it gets nothing. Most tests use a host of 2 nodes, 2 cores each, 2 threads."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import NoRoom, RequestError
from orchestrator.model.plain import to_plain
from orchestrator.model.plan import Allocated, AllocatedPages, ImageRef, NicPlan, Plan, Policy, plan_from_json
from orchestrator.model.request import GuestRequest, parse_guest_request
from orchestrator.model.topology import Core, IommuGroup, PagePool, PhysicalFunction, Topology, VirtualFunction
from orchestrator.planning.cores import list_isolation
from orchestrator.planning.inputs import Site
from orchestrator.planning.mac import is_guest_mac
from orchestrator.planning.planner import plan_guest
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size
from tests.harness.plans import add_up

M2 = Size.parse("2M")
PF = PciAddress.parse("0000:41:00.0")
POLICY = Policy(CpuSet.parse("0-1"), ("nic0",), M2)


def core(cpus: str, node: int) -> Core:
    return Core(CpuSet.parse(cpus), node, node)


def nic(name: str | None = "nic0", **changes: object) -> PhysicalFunction:
    """An 82576 as QEMU's igb shows it: offset 128, stride 2."""
    made = PhysicalFunction(PF, name, "8086:10c9", "igb", 0, True, MacAddress.parse("52:54:00:00:01:00"), 7, 128, 2, ())
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


HOST = Topology(
    cores=(core("0-1", 0), core("2-3", 0), core("4-5", 1), core("6-7", 1)),
    isolated=CpuSet.parse("2-7"),
    pools=(PagePool(0, M2, 256, 256), PagePool(1, M2, 256, 256)),
    pfs=(nic(),),
    iommu_groups=(IommuGroup(9, "DMA", (PF,)),),
)


def host(**changes: object) -> Topology:
    return dataclasses.replace(HOST, **changes)  # type: ignore[arg-type]


def request(name: str = "g1", **fields: object) -> GuestRequest:
    return parse_guest_request({"name": name, "memory": "256M", "image": "minimal", **fields})


def refusals(topology: Topology, *, taken: Allocated | None = None, policy: Policy = POLICY, **fields: object) -> tuple[str, ...]:
    """The reasons of the NoRoom that must come."""
    with pytest.raises(NoRoom) as caught:
        plan_guest(request(**fields), topology, taken or Allocated(), policy)
    assert caught.value.hint
    assert all(reason in str(caught.value) for reason in caught.value.reasons)
    return caught.value.reasons


def existing_vfs(count: int, *, pf: PhysicalFunction | None = None) -> tuple[VirtualFunction, ...]:
    pf = pf or nic()
    return tuple(VirtualFunction(pf.vf_address(index), index, "vfio-pci", 20 + index) for index in range(count))


def groups(*devices: tuple[PciAddress, ...]) -> tuple[IommuGroup, ...]:
    return tuple(IommuGroup(20 + number, "DMA", members) for number, members in enumerate(devices))


def test_first_guest_gets_the_pfs_node() -> None:
    plan = plan_guest(request(address="10.9.0.11/24", cmdline="quiet"), HOST, Allocated(), POLICY)
    assert plan == Plan(
        name="g1",
        cores=(CpuSet.parse("2-3"),),
        node=0,
        page_size=M2,
        pages=128,
        nics=(NicPlan(PF, "nic0", 0, PciAddress.parse("0000:41:10.0"), plan.vf.mac),),
        image=ImageRef("minimal"),
        cmdline="quiet nohype.address=10.9.0.11/24",
    )
    assert plan.cpus == (2, 3)
    assert plan.memory == Size.parse("256M")


@pytest.mark.parametrize(
    ("fields", "cmdline"),
    [
        ({}, ""),
        ({"cmdline": "quiet"}, "quiet"),
        ({"address": "10.9.0.1/24"}, "nohype.address=10.9.0.1/24"),
        ({"cmdline": "a b", "address": "fd00::1/64"}, "a b nohype.address=fd00::1/64"),
    ],
)
def test_kernel_command_line(fields: dict[str, object], cmdline: str) -> None:
    assert plan_guest(request(**fields), HOST, Allocated(), POLICY).cmdline == cmdline


def test_guests_fill_the_host_and_then_it_is_full() -> None:
    plans: list[Plan] = []
    for name in ("g1", "g2", "g3"):
        plans.append(plan_guest(request(name), HOST, add_up(plans, frozenset()), POLICY))
    assert [str(plan.cores[0]) for plan in plans] == ["2-3", "4-5", "6-7"]
    assert [plan.node for plan in plans] == [0, 1, 1]
    assert [str(plan.vf.address) for plan in plans] == ["0000:41:10.0", "0000:41:10.2", "0000:41:10.4"]
    assert refusals(HOST, taken=add_up(plans, frozenset()), name="g4") == (
        "node 0: 0 of 2 whole cores are free, 1 requested (cpus 0-1 are housekeeping, cpus 2-3 are owned by guests)",
        "node 1: 0 of 2 whole cores are free, 1 requested (cpus 4-7 are owned by guests); "
        "0 of 256 huge pages of 2M are free, 128 requested",
    )


def test_smt_siblings_stay_together_however_they_are_numbered() -> None:
    """Many servers number the second threads after all first ones."""
    interleaved = host(cores=(core("0,4", 0), core("1,5", 0), core("2,6", 1), core("3,7", 1)), isolated=CpuSet.parse("1-3,5-7"))
    policy = dataclasses.replace(POLICY, housekeeping=CpuSet.parse("0,4"))
    assert plan_guest(request(), interleaved, Allocated(), policy).cpus == (1, 5)
    assert plan_guest(request(cores=2, memory="2M"), interleaved, Allocated(), policy).cpus == (2, 6, 3, 7)


def test_a_core_with_one_housekeeping_cpu_is_nobodys() -> None:
    policy = dataclasses.replace(POLICY, housekeeping=CpuSet.parse("0,2"))
    plan = plan_guest(request(), host(isolated=CpuSet()), Allocated(), policy)
    assert plan.cpus == (4, 5)


def test_a_core_with_one_taken_cpu_is_nobodys() -> None:
    assert plan_guest(request(), HOST, Allocated(cpus=CpuSet.parse("3,4")), POLICY).cpus == (6, 7)


def test_only_isolated_cpus_if_some_are_isolated() -> None:
    assert plan_guest(request(), host(isolated=CpuSet.parse("3,6-7")), Allocated(), POLICY).cpus == (6, 7)
    assert "cpus 2-3 are not isolated" in refusals(host(isolated=CpuSet.parse("3")))[0]


def test_any_cpus_if_none_are_isolated() -> None:
    assert plan_guest(request(), host(isolated=CpuSet()), Allocated(), POLICY).cpus == (2, 3)


def test_cores_of_one_node_only() -> None:
    assert plan_guest(request(cores=2), HOST, Allocated(), POLICY).node == 1
    reasons = refusals(HOST, cores=3)
    assert [reason.split(" of ")[0] for reason in reasons] == ["node 0: 1", "node 1: 2"]


def test_cores_of_different_width_are_not_mixed() -> None:
    """A sibling may be switched off; and hybrid CPUs have cores without a second thread."""
    mixed = host(cores=(core("0-1", 0), core("2", 0), core("3-4", 0), core("5", 0)), isolated=CpuSet(), pools=HOST.pools[:1])
    assert plan_guest(request(), mixed, Allocated(), POLICY).cpus == (3, 4)
    assert plan_guest(request(cores=2), mixed, Allocated(), POLICY).cpus == (2, 5)
    assert "3 of 4 whole cores are free, 3 requested with the same number of threads" in refusals(mixed, cores=3)[0]


def test_without_a_node_of_the_pf_the_fullest_node_is_used_first() -> None:
    """Best fit: what is left over is of use for a bigger guest."""
    cores = (core("0-1", 0), core("2-3", 0), core("8-9", 0), core("4-5", 1), core("6-7", 1))
    big = host(cores=cores, isolated=CpuSet(), pfs=(nic(node=None),))
    assert plan_guest(request(), big, Allocated(cpus=CpuSet.parse("4-5")), POLICY).cpus == (6, 7)
    assert plan_guest(request(), big, Allocated(), POLICY).cpus == (2, 3)


def test_pfs_node_counts_more_than_a_good_fit() -> None:
    taken = Allocated(cpus=CpuSet.parse("2-3"))
    assert plan_guest(request(), host(pfs=(nic(node=1),)), Allocated(), POLICY).node == 1
    assert plan_guest(request(), host(pfs=(nic(node=0),)), taken, POLICY).node == 1


def second_nic(**changes: object) -> PhysicalFunction:
    return nic("nic1", **{"address": PciAddress.parse("0000:81:00.0"), "node": 1, "mac": None, **changes})


def test_uplink_of_the_node_with_room_is_used() -> None:
    policy = dataclasses.replace(POLICY, uplinks=("nic0", "nic1"))
    two = host(pfs=(nic(), second_nic()))
    near = plan_guest(request(), two, Allocated(cpus=CpuSet.parse("2-3")), policy)
    assert (near.node, near.vf.interface, str(near.vf.address)) == (1, "nic1", "0000:81:10.0")
    first = plan_guest(request(), host(pfs=(second_nic(node=0), nic())), Allocated(), policy)
    assert first.vf.interface == "nic0", "of equal uplinks the one named first is used"


def test_uplink_that_is_down_is_passed_over_but_named_when_nothing_is_left() -> None:
    policy = dataclasses.replace(POLICY, uplinks=("nic0", "nic1"))
    assert plan_guest(request(), host(pfs=(nic(up=False), second_nic())), Allocated(), policy).vf.interface == "nic1"
    reasons = refusals(host(pfs=(nic(up=False), second_nic(up=False))), policy=policy)
    assert len(reasons) == 2
    assert "uplink nic0: the PF 0000:41:00.0 is down" in reasons[0]
    assert "uplink nic1: the PF 0000:81:00.0 is down" in reasons[1]


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        (host(pfs=()), "uplink nic0: there is no SR-IOV capable network interface of this name"),
        (host(pfs=(nic(None),)), "uplink nic0: there is no SR-IOV"),
        (host(pfs=(nic(up=False),)), "is down"),
        (host(pfs=(nic(total_vfs=0),)), "PF 0000:41:00.0 cannot have VFs"),
        (host(iommu_groups=()), "no IOMMU"),
    ],
)
def test_no_network(topology: Topology, says: str) -> None:
    (reason,) = refusals(topology)
    assert says in reason


def test_no_uplink_configured() -> None:
    assert refusals(HOST, policy=dataclasses.replace(POLICY, uplinks=())) == ("network: no uplink is configured",)


def test_vfs_run_out() -> None:
    taken = Allocated(vfs=frozenset(nic().vf_address(index) for index in range(7)))
    assert refusals(HOST, taken=taken) == ("uplink nic0: no free VF of 7",)
    assert plan_guest(request(), HOST, Allocated(vfs=taken.vfs - {nic().vf_address(5)}), POLICY).vf.index == 5


def test_the_operator_may_limit_the_vfs() -> None:
    policy = dataclasses.replace(POLICY, vfs_per_uplink=2)
    both = Allocated(vfs=frozenset(nic().vf_address(index) for index in range(2)))
    assert plan_guest(request(), HOST, Allocated(), policy).vf.index == 0
    assert refusals(HOST, taken=both, policy=policy) == ("uplink nic0: no free VF of 2",)
    assert dataclasses.replace(POLICY, vfs_per_uplink=99).count_vfs(nic()) == 7


def test_vfs_that_exist_are_all_there_are() -> None:
    """Their number can't be changed while one of them is in use."""
    pf = nic(vfs=existing_vfs(2))
    topology = host(pfs=(pf,), iommu_groups=groups((pf.vf_address(0),), (pf.vf_address(1),)))
    one = Allocated(vfs=frozenset({pf.vf_address(0)}))
    assert plan_guest(request(), topology, one, POLICY).vf.index == 1
    both = Allocated(vfs=frozenset({pf.vf_address(0), pf.vf_address(1)}))
    assert refusals(topology, taken=both) == ("uplink nic0: no free VF of 2 (of 7 possible)",)


def test_vf_that_shares_its_iommu_group_is_passed_over() -> None:
    pf = nic(vfs=existing_vfs(2))
    stranger = PciAddress.parse("0000:03:00.0")
    topology = host(pfs=(pf,), iommu_groups=groups((pf.vf_address(0), stranger), (pf.vf_address(1),)))
    assert plan_guest(request(), topology, Allocated(), POLICY).vf.index == 1
    (reason,) = refusals(host(pfs=(pf,), iommu_groups=groups((pf.vf_address(0), stranger))))
    assert "VF 0000:41:10.0 shares IOMMU group 20 with 0000:03:00.0" in reason
    assert "VF 0000:41:10.2 is in no IOMMU group" in reason


@pytest.mark.parametrize(
    ("memory", "hint"), [("257M", "use 256M or 258M"), ("1M", "use 2M"), ("3M", "use 2M or 4M"), ("2097153", "use 2M or 4M")]
)
def test_memory_that_is_no_multiple_of_the_page_size(memory: str, hint: str) -> None:
    with pytest.raises(RequestError, match=f"memory {memory} .* page size 2M") as caught:
        plan_guest(request(memory=memory), HOST, Allocated(), POLICY)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("pools", "others"),
    [
        ((), ("", "")),
        ((PagePool(0, M2, 0, 0), PagePool(1, M2, 0, 0)), ("", "")),
        ((PagePool(0, Size.parse("1G"), 9, 9), PagePool(1, Size.parse("64K"), 9, 0)), (", only of 1G", ", only of 64K")),
    ],
)
def test_no_pool_of_the_page_size(pools: tuple[PagePool, ...], others: tuple[str, str]) -> None:
    assert refusals(host(pools=pools)) == tuple(f"node {node}: no huge pages of 2M{others[node]}" for node in (0, 1))


def test_pages_of_one_gigabyte() -> None:
    size = Size.parse("1G")
    topology = host(pools=(*HOST.pools, PagePool(1, size, 4, 4)))
    plan = plan_guest(request(memory="3G"), topology, Allocated(), dataclasses.replace(POLICY, page_size=size))
    assert (plan.node, plan.pages, plan.page_size, plan.memory) == (1, 3, size, Size.parse("3G"))


@pytest.mark.parametrize(
    ("free", "owned", "unused", "left"),
    [
        (256, 0, 0, 256),
        (256, 128, 128, 128),  # claimed, not started: the pool does not know yet
        (128, 128, 0, 128),  # started: the pool has counted it, once
        (128, 128, 128, 0),  # starting: counted twice for a moment, never missed
        (64, 128, 0, 64),  # strangers hold 64
        (256, 128, 0, 128),  # ended, but its claim stands: still its own
        (0, 256, 256, 0),
        (10, 0, 20, 0),
    ],
)
def test_pages_are_counted_once(free: int, owned: int, unused: int, left: int) -> None:
    topology = host(cores=HOST.cores[:2], pools=(PagePool(0, M2, 256, free),))
    taken = Allocated(
        pages=(AllocatedPages(0, M2, owned, unused), AllocatedPages(1, M2, 999, 999), AllocatedPages(0, Size.parse("1G"), 9, 9))
    )
    if left:
        assert plan_guest(request(memory=str(Size(left * M2.bytes))), topology, taken, POLICY).pages == left
    (reason,) = refusals(topology, taken=taken, memory=str(Size((left + 1) * M2.bytes)))
    assert reason == f"node 0: {left} of 256 huge pages of 2M are free, {left + 1} requested"


def test_claims_add_up() -> None:
    one = plan_guest(request("g1"), HOST, Allocated(), POLICY)
    two = plan_guest(request("g2", memory="64M"), HOST, add_up([one], frozenset()), POLICY)
    three = dataclasses.replace(two, name="g3", cores=(CpuSet.parse("6-7"),))
    assert add_up([one, two, three], frozenset({"g2", "other"})) == Allocated(
        cpus=CpuSet.parse("2-7"),
        vfs=frozenset({one.vf.address, two.vf.address}),
        numbers=frozenset({(one.vf.pf, one.vf.index), (two.vf.pf, two.vf.index)}),
        macs=frozenset({one.vf.mac, two.vf.mac}),
        pages=(AllocatedPages(0, M2, 128, 128), AllocatedPages(1, M2, 64, 32)),
    )
    assert add_up([], frozenset({"g1"})) == Allocated()


def test_mac_address_is_ours_free_and_the_same_again() -> None:
    mac = plan_guest(request(), HOST, Allocated(), POLICY).vf.mac
    assert is_guest_mac(mac)
    assert plan_guest(request(), HOST, Allocated(), POLICY).vf.mac == mac
    assert plan_guest(request("g2"), HOST, Allocated(), POLICY).vf.mac != mac
    other_host = host(pfs=(nic(mac=MacAddress.parse("52:54:00:00:01:01")),))
    assert plan_guest(request(), other_host, Allocated(), POLICY).vf.mac != mac, "hosts share a network"
    assert plan_guest(request(), HOST, Allocated(), POLICY, Site(host_id="ab")).vf.mac != mac, (
        "of emulated NICs all have one address"
    )
    second = plan_guest(request(), HOST, Allocated(macs=frozenset({mac})), POLICY).vf.mac
    assert int(str(second).replace(":", ""), 16) - int(str(mac).replace(":", ""), 16) == 1
    of_pf = host(pfs=(nic(), second_nic(mac=mac)))
    assert plan_guest(request(), of_pf, Allocated(), POLICY).vf.mac == second


CPUS = st.integers(1, 4)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Small hosts of every kind: SMT or not, some CPUs isolated, more or fewer pages, VFs that exist or do not."""
    cores, first = [], 0
    for _ in range(draw(st.integers(1, 6))):
        width = draw(st.sampled_from([1, 2, 2, 4]))
        cores.append(core(",".join(map(str, range(first, first + width))), draw(st.integers(0, 1))))
        first += width
    isolated = draw(st.just(frozenset[int]()) | st.frozensets(st.integers(0, first - 1)))
    pools = tuple(PagePool(node, M2, total := draw(st.integers(0, 20)), draw(st.integers(0, total))) for node in (0, 1))
    pf = nic(node=draw(st.sampled_from([None, 0, 1])), up=draw(st.integers(0, 9)) > 0, total_vfs=draw(st.integers(0, 4)))
    pf = dataclasses.replace(pf, vfs=existing_vfs(draw(st.integers(0, pf.total_vfs))))
    members = tuple((pf.vf_address(index),) for index in range(pf.total_vfs))
    return Topology(tuple(cores), CpuSet(isolated), pools, (pf,), groups((PF,), *members))


def has_room(wanted: GuestRequest, topology: Topology, taken: Allocated) -> bool:
    """By brute force and in other words than the planner's."""
    pf = topology.pfs[0]
    vfs = [index for index in range(len(pf.vfs) or pf.total_vfs) if pf.vf_address(index) not in taken.vfs]
    for node in (0, 1):
        forbidden = {*POLICY.housekeeping, *taken.cpus}
        if topology.isolated:
            forbidden |= set(topology.cpus) - set(topology.isolated)
        usable = [len(one.cpus) for one in topology.cores if one.node == node and forbidden.isdisjoint(one.cpus)]
        pages = sum(pool.free for pool in topology.pools if pool.node == node)
        pages -= sum(claim.unused for claim in taken.pages if claim.node == node)
        enough = pages >= wanted.size.bytes // M2.bytes
        if vfs and pf.up and enough and any(usable.count(width) >= wanted.cores for width in usable):
            return True
    return False


@given(topologies(), st.lists(st.tuples(st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=5))
def test_nothing_is_given_twice_and_room_is_found_if_there_is_any(topology: Topology, wishes: list[tuple[int, int]]) -> None:
    plans: list[Plan] = []
    for number, (cores, pages) in enumerate(wishes):
        wanted = request(f"g{number}", cores=cores, memory=str(Size(pages * M2.bytes)))
        # None has been started: the pools still show what was free at first. What strangers hold is the rest.
        taken = add_up(plans, frozenset())
        if not has_room(wanted, topology, taken):
            with pytest.raises(NoRoom):
                plan_guest(wanted, topology, taken, POLICY)
            continue
        plan = plan_guest(wanted, topology, taken, POLICY)
        plans.append(plan)
        whole = {one.cpus: one for one in topology.cores}
        assert len(plan.cores) == cores
        assert {whole[cpus].node for cpus in plan.cores} == {plan.node}
        assert len({len(cpus) for cpus in plan.cores}) == 1
        assert not set(plan.cpus) & set(POLICY.housekeeping)
        assert not topology.isolated or set(plan.cpus) <= set(topology.isolated)
        assert plan.memory == wanted.size
    cpus = [cpu for plan in plans for cpu in plan.cpus]
    assert len(cpus) == len(set(cpus))
    assert len({plan.vf.address for plan in plans}) == len({plan.vf.mac for plan in plans}) == len(plans)
    for pool in topology.pools:
        assert sum(plan.pages for plan in plans if plan.node == pool.node) <= pool.free


ADDRESSES = st.builds(PciAddress, st.integers(0, 0xFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7))
PLANS = st.builds(
    Plan,
    name=st.from_regex(r"[a-z0-9]{1,40}", fullmatch=True),
    cores=st.lists(st.frozensets(st.integers(0, 999), min_size=1, max_size=8).map(CpuSet), min_size=1, max_size=4).map(tuple),
    node=st.integers(0, 63),
    page_size=st.sampled_from([M2, Size.parse("1G"), Size.parse("64K")]),
    pages=st.integers(1, 1 << 30),
    nics=st.lists(
        st.builds(
            NicPlan,
            pf=ADDRESSES,
            interface=st.text(min_size=1, max_size=15),
            index=st.integers(0, 255),
            address=ADDRESSES,
            mac=st.integers(0, (1 << 24) - 1).map(lambda suffix: MacAddress("02:4e:48:" + suffix.to_bytes(3, "big").hex(":"))),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    image=st.builds(ImageRef, st.text(min_size=1, max_size=40), st.text(max_size=8)),
    uuid=st.uuids(),
    cmdline=st.text(max_size=200),
)


@given(PLANS)
def test_plan_survives_json(plan: Plan) -> None:
    assert plan_from_json(json.loads(json.dumps(to_plain(plan)))) == plan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"node": "0"}, "node"),
        ({"pages": None}, "pages"),
        ({"nics": [{}]}, "nics.0.pf: missing"),
        ({"nics": []}, "nics: empty"),
        ({"image": "minimal"}, "image: not an object"),
        ({"cores": "2-3"}, "cores"),
        ({"cores": ["x"]}, "'x' is not a list of CPUs"),
        ({"page_size": "much"}, "'much' is not a size"),
        ({"disk": "sda"}, "disk"),
    ],
)
def test_json_that_is_no_plan(change: dict[str, object], says: str) -> None:
    fields = to_plain(plan_guest(request(), HOST, Allocated(), POLICY))
    with pytest.raises(ValueError, match=says):
        plan_from_json({**fields, **change})


def test_profile_isolates_the_application_vcpus_in_the_guests_kernel() -> None:
    """Before the request's own words. Linux takes the first of different lists (kernel/sched/isolation.c)."""
    fields = {"cores": 2, "housekeeping": "0-1", "cmdline": "nohz_full=3", "address": "10.9.0.11/24"}
    plan = plan_guest(request(profile="tickless", **fields), HOST, Allocated(), POLICY)
    isolation = "isolcpus=managed_irq,domain,2-3 nohz_full=2-3 rcu_nocbs=2-3 irqaffinity=0-1"
    assert plan.cmdline == f"{isolation} nohz_full=3 nohype.address=10.9.0.11/24"
    assert plan_guest(request(**fields), HOST, Allocated(), POLICY).cmdline == "nohz_full=3 nohype.address=10.9.0.11/24"


@pytest.mark.parametrize(("step", "fits"), [(2, False), (64, True)])
def test_profile_whose_words_have_no_room_is_refused(step: int, fits: bool) -> None:
    """The kernel would cut off the end of its command line: the guest's address and disks."""
    housekeeping = ",".join(str(vcpu) for vcpu in range(0, 256, step))
    asked = request(profile="tickless", housekeeping=housekeeping)
    if fits:
        assert sum(len(word) for word in list_isolation(asked, 256)) < 512
        return
    with pytest.raises(RequestError, match=r"words for the kernel of guest g1 have \d+ characters, at most 512") as caught:
        list_isolation(asked, 256)
    assert "as few ranges" in caught.value.hint


@pytest.mark.parametrize("housekeeping", ["0-1", "0-7"])
def test_profile_without_application_vcpus_is_refused(housekeeping: str) -> None:
    with pytest.raises(RequestError, match="all 2 vCPUs of guest g1 do the housekeeping") as caught:
        plan_guest(request(profile="tickless", housekeeping=housekeeping), HOST, Allocated(), POLICY)
    assert "name fewer of them" in caught.value.hint
