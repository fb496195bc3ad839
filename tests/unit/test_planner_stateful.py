"""Planner and ledger together on random hosts, through random lives of guests, against a slow check in other words.

The machine must find broken planners: several are run on purpose, and it must fail with each.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from orchestrator.errors import LostRace, NoRoom
from orchestrator.ledger import Ledger
from orchestrator.model.plan import Allocated, ImageRef, Plan, Policy
from orchestrator.model.request import GuestRequest, parse_guest_request
from orchestrator.model.state import GuestState
from orchestrator.model.topology import (
    Core,
    IommuGroup,
    NvmeController,
    NvmeNamespace,
    PagePool,
    PhysicalFunction,
    Topology,
    VirtualFunction,
)
from orchestrator.planning.planner import plan_guest
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size
from tests.harness.plans import add_up

M2, G1 = Size.parse("2M"), Size.parse("1G")
PF = PhysicalFunction(
    PciAddress(0, 0x41, 0, 0), "nic0", "8086:10c9", "igb", 0, True, MacAddress("52:54:00:00:00:00"), 8, 128, 2, ()
)  # fmt: skip
Planner = Callable[[GuestRequest, Topology, Allocated, Policy], Plan]


@st.composite
def uplinks(draw: st.DrawFn) -> tuple[PhysicalFunction, ...]:
    """Up to two PFs, some down, some of a node, some with VFs already."""
    pfs = []
    for number in range(draw(st.integers(1, 2))):
        mac, node = MacAddress(f"52:54:00:00:00:0{number}"), draw(st.sampled_from([None, 0, 1]))
        total, up = draw(st.integers(1, 4)), draw(st.integers(0, 9)) > 0
        address = PciAddress(0, 0x41 + number, 0, 0)
        pf = PhysicalFunction(address, f"nic{number}", "8086:10c9", "igb", node, up, mac, total, 128, 2, ())
        exist = range(draw(st.sampled_from([0, total, total - 1])))
        vfs = tuple(VirtualFunction(pf.vf_address(index), index, None, 10 * number + index) for index in exist)
        pfs.append(dataclasses.replace(pf, vfs=vfs))
    return tuple(pfs)


@st.composite
def controllers(draw: st.DrawFn) -> tuple[NvmeController, ...]:
    """Up to four NVMe disks, some in use, some with data."""
    disks = []
    for number in range(draw(st.sampled_from([0, 1, 2, 4]))):
        size, node = Size(draw(st.sampled_from([1, 2, 4])) << 30), draw(st.sampled_from([None, 0, 1]))
        space = NvmeNamespace(1, f"nvme{number}n1", size, 512)
        uses, signatures = draw(st.sampled_from([((), ()), ((), ()), ((), ()), (("mounted",), ()), ((), ("ext4",))]))
        address = PciAddress(0, 0x50 + number, 0, 0)
        disk = NvmeController(address, f"nvme{number}", f"serial{number}", "a disk", node, "nvme", 50 + number, (space,))
        disks.append(dataclasses.replace(disk, uses=uses, signatures=signatures))
    return tuple(disks)


@st.composite
def hosts(draw: st.DrawFn) -> tuple[Topology, Policy]:
    """Small hosts: one or two sockets and nodes, SMT widths mixed, pools of two sizes, some of it used by strangers."""
    cores, first = [], 0
    same_node = draw(st.booleans())
    for socket in range(draw(st.integers(1, 2))):
        for _ in range(draw(st.integers(1, 5))):
            width = draw(st.sampled_from([1, 2, 2, 2]))
            cores.append(Core(CpuSet.of(range(first, first + width)), socket, 0 if same_node else socket))
            first += width
    cpus = st.frozensets(st.integers(0, first - 1))
    isolated = draw(
        st.just(frozenset[int]()) | cpus.map(lambda some: frozenset(range(first)) - (some if len(some) < 3 else set()))
    )
    pools = tuple(
        PagePool(node, size, total := draw(st.integers(0, most)), draw(st.integers(max(0, total - 2), total)))
        for node in sorted({core.node for core in cores})
        for size, most in ((M2, 12), (G1, 3))
    )
    pfs = draw(uplinks())
    vfs = [vf.address for pf in pfs for vf in pf.vfs]
    # At times two VFs are of one group, and neither can be a guest's.
    together = 2 if draw(st.integers(0, 4)) == 0 else 1
    disks = draw(controllers())
    members = [tuple(vfs[:together]), *((vf,) for vf in vfs[together:]), *((one.address,) for one in (*pfs, *disks))]
    groups = tuple(IommuGroup(number, "DMA", some) for number, some in enumerate(members) if some)
    policy = Policy(
        housekeeping=CpuSet.of(draw(st.sampled_from([{0}, {0, 1}, {first - 1}]))),
        uplinks=draw(st.sampled_from([("nic0",), ("nic0", "nic1"), ("nic1", "nic0")])),
        page_size=M2,
        vfs_per_uplink=draw(st.none() | st.integers(1, 3)),
        reserved_pages=draw(st.sampled_from([(), ((M2, 2),), ((G1, 1), (M2, 1))])),
        disk_serials=draw(st.sampled_from([frozenset(), frozenset({"serial0", "serial1"})])),
    )
    return Topology(tuple(cores), CpuSet(isolated), pools, pfs, groups, controllers=disks), policy


def may_have_cores(cores: tuple[Core, ...], topology: Topology, taken: frozenset[int], policy: Policy) -> bool:
    """Whether these cores together could be one guest's."""
    cpus = {cpu for core in cores for cpu in core.cpus}
    alike = all(may_be_together(cores[0], core) for core in cores)
    isolated = set(topology.isolated) or set(topology.cpus)
    return alike and cpus.isdisjoint({*policy.housekeeping, *taken}) and cpus <= isolated


def may_be_together(one: Core, other: Core) -> bool:
    """Whether two cores could be of one guest."""
    return (one.node, len(one.cpus)) == (other.node, len(other.cpus))


def may_have_vf(pf: PhysicalFunction, index: int, topology: Topology, taken: frozenset[PciAddress], policy: Policy) -> bool:
    """Whether this VF could be a guest's."""
    address = pf.vf_address(index)
    if pf.interface not in policy.uplinks or not pf.up or not topology.iommu_groups or address in taken:
        return False
    if not pf.vfs:
        return index < pf.total_vfs and index < (policy.vfs_per_uplink or pf.total_vfs)
    return index < len(pf.vfs) and any(group.devices == (address,) for group in topology.iommu_groups)


def count_runs(cores: tuple[Core, ...], topology: Topology) -> int:
    """In how many runs of neighbours these cores are."""
    order = [core for core in topology.cores if core.node == cores[0].node]
    places = sorted(order.index(core) for core in cores)
    follows = [b == a + 1 and order[a].socket == order[b].socket for a, b in zip(places, places[1:], strict=False)]
    return 1 + follows.count(False)


class GuestLives(RuleBasedStateMachine):
    """A host whose guests come, start, end and go. ``planner`` is what is tried."""

    planner: Planner = staticmethod(plan_guest)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.path = Path(self.folder.name, "ledger.sqlite")
        self.ledger = Ledger(self.path)
        self.plans: dict[str, Plan] = {}
        self.started: set[str] = set()
        self.names = 0

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()

    @initialize(host=hosts())
    def survey(self, host: tuple[Topology, Policy]) -> None:
        self.host, self.policy = host

    def topology(self) -> Topology:
        """The host as it is now: pages of guests that run are in use."""
        used = [plan for name, plan in self.plans.items() if name in self.started]

        def now(pool: PagePool) -> PagePool:
            of_guests = sum(plan.pages for plan in used if (plan.node, plan.page_size) == (pool.node, pool.page_size))
            return dataclasses.replace(pool, free=pool.free - of_guests)

        return dataclasses.replace(self.host, pools=tuple(map(now, self.host.pools)))

    def free_pages(self, node: int, size: Size) -> int:
        """What guests may have of a pool (not what strangers use or what the host keeps, whichever is more) and none has."""
        kept = dict(self.policy.reserved_pages).get(size, 0)
        pools = [pool for pool in self.host.pools if (pool.node, pool.page_size) == (node, size)]
        owned = sum(plan.pages for plan in self.plans.values() if (plan.node, plan.page_size) == (node, size))
        return sum(max(0, pool.total - max(pool.total - pool.free, kept)) for pool in pools) - owned

    def legal_cores(self, count: int) -> Iterator[tuple[Core, ...]]:
        """All sets of cores that a guest could get, by brute force."""
        taken = frozenset(cpu for plan in self.plans.values() for cpu in plan.cpus)
        for cores in combinations(self.host.cores, count):
            if may_have_cores(cores, self.host, taken, self.policy):
                yield cores

    def legal_vfs(self) -> set[PciAddress]:
        """All VFs that a guest could get."""
        taken = frozenset(plan.vf.address for plan in self.plans.values())
        pairs = [(pf, index) for pf in self.host.pfs for index in range(pf.total_vfs)]
        return {pf.vf_address(index) for pf, index in pairs if may_have_vf(pf, index, self.host, taken, self.policy)}

    def legal_disks(self) -> dict[str, NvmeController]:
        """All disks that a guest could get."""
        taken = {disk.serial for plan in self.plans.values() for disk in plan.disks}
        return {
            disk.serial: disk
            for disk in self.host.controllers
            if disk.serial and disk.serial not in taken and not disk.uses
            and (not disk.signatures or disk.serial in self.policy.disk_serials)
        }  # fmt: skip

    def have_disks(self, sizes: list[int]) -> bool:
        """Whether there is a disk for each size, by brute force."""
        free = [disk.size.bytes >> 30 for disk in self.legal_disks().values()]
        return any(all(has >= size for has, size in zip(some, sizes, strict=True)) for some in permutations(free, len(sizes)))

    def plan(self, request: GuestRequest) -> tuple[Plan | None, int]:
        """Plans twice, the second time from the same facts in another order."""
        read = self.ledger.read()
        taken = add_up((claim.plan for claim in read.claims), frozenset(self.started))
        topology = self.topology()
        found: list[Plan | None] = []
        for host in (
            topology,
            dataclasses.replace(topology, pools=topology.pools[::-1], iommu_groups=topology.iommu_groups[::-1]),
        ):
            try:
                found.append(self.planner(request, host, taken, self.policy))
            except NoRoom as error:
                found += [None] if error.reasons else []
        assert len(found) == 2, "refused without a reason"
        assert found[0] == found[1], "the same host and request, another plan"
        return found[0], read.generation

    def claim(self, plan: Plan, generation: int, request: GuestRequest) -> None:
        self.ledger.claim(plan, generation, request)
        self.plans[plan.name] = plan

    def request(self, **fields: object) -> GuestRequest:
        self.names += 1
        return parse_guest_request({"name": f"g{self.names}", "image": "minimal", **fields})

    def check_plan(self, plan: Plan, request: GuestRequest, size: Size) -> tuple[Core, ...]:
        """What holds for each plan, given place or not; returns its cores."""
        whole = {core.cpus: core for core in self.host.cores}
        assert set(plan.cores) <= whole.keys(), "not whole cores"
        cores = tuple(whole[cpus] for cpus in plan.cores)
        assert cores in set(self.legal_cores(len(cores))), "cores that are not to be had, or of several kinds or nodes"
        assert plan.node == cores[0].node
        assert plan.page_size == size
        assert plan.memory == request.size
        assert plan.pages <= self.free_pages(plan.node, size), "more pages than there are"
        assert plan.vf.address in self.legal_vfs(), "a VF that is not to be had"
        assert [pf.vf_address(plan.vf.index) for pf in self.host.pfs if pf.address == plan.vf.pf] == [plan.vf.address]
        assert plan.name == request.name
        return cores

    @rule(
        count=st.integers(1, 4), pages=st.integers(1, 5), size=st.sampled_from([None, None, "2M", "1G"]),
        disks=st.sampled_from([[], [], [1], [1], [4], [1, 2]]),
    )  # fmt: skip
    def create(self, count: int, pages: int, size: str | None, disks: list[int]) -> None:
        page_size = Size.parse(size or "2M")
        wanted = [{"size": f"{gigabytes}G"} for gigabytes in disks]
        request = self.request(cores=count, memory=str(Size(pages * page_size.bytes)), page_size=size, disks=wanted)
        plan, generation = self.plan(request)
        legal = [cores for cores in self.legal_cores(count) if self.free_pages(cores[0].node, page_size) >= pages]
        if plan is None:
            assert not legal or not self.legal_vfs() or not self.have_disks(disks), "refused although there is room"
            return
        free = self.legal_disks()
        assert all(disk.serial in free and free[disk.serial].address == disk.address for disk in plan.disks), "not to be had"
        assert all(disk.size.bytes >> 30 >= size for disk, size in zip(plan.disks, disks, strict=True)), "too small"
        assert len({disk.serial for disk in plan.disks}) == len(disks), "a disk is given twice"
        cores = self.check_plan(plan, request, page_size)
        assert len(cores) == count
        self.check_fit(cores, legal)
        self.claim(plan, generation, request)

    def check_fit(self, chosen: tuple[Core, ...], legal: list[tuple[Core, ...]]) -> None:
        """As few runs as can be; if it is one, then none that could have stayed longer is broken."""
        alike = [cores for cores in legal if may_be_together(cores[0], chosen[0])]
        assert count_runs(chosen, self.host) == min(count_runs(cores, self.host) for cores in alike), "scattered"
        if count_runs(chosen, self.host) == 1:
            neighbours = [cores for cores in alike if count_runs(cores, self.host) == 1]
            assert self.longest_left(chosen) == max(map(self.longest_left, neighbours)), "a long run was broken without need"

    def longest_left(self, cores: tuple[Core, ...]) -> int:
        """The longest run of such cores that stays free on the node."""
        left = [core for (core,) in self.legal_cores(1) if core not in cores and may_be_together(core, cores[0])]
        some = (some for count in range(1, len(left) + 1) for some in combinations(left, count))
        return max((len(run) for run in some if count_runs(run, self.host) == 1), default=0)

    @rule(data=st.data(), pages=st.integers(1, 3))
    def create_at_a_given_place(self, data: st.DataObject, pages: int) -> None:
        several = data.draw(st.lists(st.sampled_from(self.host.cores), min_size=1, max_size=3, unique=True))
        cpus = CpuSet.of(cpu for core in several for cpu in core.cpus)
        if data.draw(st.integers(0, 4)) == 0:
            cpus = data.draw(st.sampled_from([CpuSet.of([min(cpus.ids)]), cpus | CpuSet.of([999])]))
        addresses = [pf.vf_address(index) for pf in self.host.pfs for index in range(pf.total_vfs)]
        vf = data.draw(st.none() | st.sampled_from([*addresses, self.host.pfs[0].address]))
        placement = {"cpus": str(cpus), "vf": str(vf) if vf else None}
        request = self.request(memory=str(Size(pages * M2.bytes)), placement=placement)
        plan, generation = self.plan(request)
        legal_vfs = self.legal_vfs()
        fits = [
            cores
            for cores in self.legal_cores(len(several))
            if CpuSet.of(cpu for core in cores for cpu in core.cpus) == cpus and self.free_pages(cores[0].node, M2) >= pages
        ]
        if plan is None:
            assert not fits or not legal_vfs or vf not in {None, *legal_vfs}, "refused although it can be had"
            return
        assert CpuSet.of(cpu for core in self.check_plan(plan, request, M2) for cpu in core.cpus) == cpus
        assert vf in (None, plan.vf.address)
        self.claim(plan, generation, request)

    @rule(count=st.integers(1, 2))
    def claims_based_on_the_same_reading(self, count: int) -> None:
        """Of two that plan at once, one is first and the other must plan again."""
        first, second = self.request(cores=1, memory="2M"), self.request(cores=count, memory="2M")
        (plan, generation), (other, _) = self.plan(first), self.plan(second)
        assume(plan and other)
        assert plan
        assert other
        self.check_plan(plan, first, M2)
        self.claim(plan, generation, first)
        with pytest.raises(LostRace):
            self.ledger.claim(other, generation, second)

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def starts(self, data: st.DataObject) -> None:
        self.started.add(data.draw(st.sampled_from(sorted(self.plans))))

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def ends_by_itself(self, data: st.DataObject) -> None:
        """Its pages are free again, and still its own."""
        self.started.remove(data.draw(st.sampled_from(sorted(self.started))))

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def goes(self, data: st.DataObject) -> None:
        """What it had can be had again, and the host looks as if it had never been."""
        name = data.draw(st.sampled_from(sorted(self.plans)))
        gone = self.plans.pop(name)
        self.started.discard(name)
        if gone.disks:
            self.ledger.set_state(name, GuestState.DELETING)
            assert self.ledger.keep_disks(name).plan == gone.only_disks()
            again, _ = self.plan(self.request(memory=str(gone.memory), page_size=str(gone.page_size), cores=len(gone.cores)))
            assert again, "what was released can't be had while the disks are wiped"
        self.ledger.release(name)
        placement = {"cpus": ",".join(map(str, gone.cores)), "vf": str(gone.vf.address)}
        again, _ = self.plan(self.request(memory=str(gone.memory), page_size=str(gone.page_size), placement=placement))
        assert again, "what was released can't be had"
        assert (again.cores, again.node, again.pages, again.vf.address) == (gone.cores, gone.node, gone.pages, gone.vf.address)

    @rule()
    def manager_starts_again(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.path)

    @invariant()
    def ledger_knows_the_guests_and_no_others(self) -> None:
        assert {claim.plan.name: claim.plan for claim in self.ledger.read().claims} == self.plans

    @invariant()
    def nothing_is_two_guests(self) -> None:
        plans = self.plans.values()
        cpus = [cpu for plan in plans for cpu in plan.cpus]
        assert len(cpus) == len(set(cpus))
        disks = [disk.serial for plan in plans for disk in plan.disks]
        assert len(disks) == len(set(disks))
        assert len({plan.vf.address for plan in plans}) == len({plan.vf.mac for plan in plans}) == len(plans)
        for pool in self.host.pools if hasattr(self, "host") else ():
            assert self.free_pages(pool.node, pool.page_size) >= 0


@st.composite
def scarce_hosts(draw: st.DrawFn) -> tuple[Topology, Policy]:
    """Hosts of one node with enough cores and VFs, so that pages and disks run out first. Some disks contain data."""
    cores = tuple(Core(CpuSet.of([2 * number, 2 * number + 1]), 0, 0) for number in range(8))
    vfs = tuple(VirtualFunction(PF.vf_address(index), index, None, index) for index in range(8))
    total = draw(st.integers(4, 9))
    disks = tuple(
        NvmeController(
            PciAddress(0, 0x50 + number, 0, 0), f"nvme{number}", f"serial{number}", "a disk", 0, "nvme", 50 + number,
            (NvmeNamespace(1, f"nvme{number}n1", Size(4 << 30), 512),), signatures=signatures,
        )
        for number, signatures in enumerate(draw(st.lists(st.sampled_from([(), (), ("ext4",)]), min_size=1, max_size=3)))
    )  # fmt: skip
    alone = [*(vf.address for vf in vfs), *(disk.address for disk in disks)]
    groups = tuple(IommuGroup(number, "DMA", (address,)) for number, address in enumerate(alone))
    policy = Policy(CpuSet.of([0, 1]), ("nic0",), M2, None, draw(st.sampled_from([(), ((M2, 1),)])))
    pools = (PagePool(0, M2, total, total),)
    return Topology(cores, CpuSet(frozenset()), pools, (dataclasses.replace(PF, vfs=vfs),), groups, controllers=disks), policy


class ScarceLives(GuestLives):
    """What is wrong with pages or disks shows here within some lives; on random hosts it takes hundreds."""

    @initialize(host=scarce_hosts())
    def survey(self, host: tuple[Topology, Policy]) -> None:
        self.host, self.policy = host


@pytest.mark.parametrize("machine", [GuestLives, ScarceLives])
def test_lives_of_guests(machine: type[GuestLives]) -> None:
    run(machine, examples=60)


def run(machine: type[GuestLives], *, examples: int, **more: Any) -> None:
    options = settings(
        max_examples=examples, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), **more
    )
    run_state_machine_as_test(machine, settings=options)


def forgets_cpus(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Looks at no guest's CPUs."""
    return plan_guest(request, topology, dataclasses.replace(taken, cpus=CpuSet()), policy)


def forgets_vfs(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Looks at no guest's VFs."""
    return plan_guest(request, topology, dataclasses.replace(taken, vfs=frozenset(), numbers=frozenset()), policy)


def forgets_disks(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Looks at no guest's disks."""
    return plan_guest(request, topology, dataclasses.replace(taken, disks=frozenset()), policy)


def destroys_data(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Takes disks that the host uses, or that hold data."""
    disks = tuple(dataclasses.replace(disk, uses=(), signatures=()) for disk in topology.controllers)
    return plan_guest(request, dataclasses.replace(topology, controllers=disks), taken, policy)


def forgets_pages(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Believes what the pool shows as free."""
    return plan_guest(request, topology, dataclasses.replace(taken, pages=()), policy)


def counts_pages_twice(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Takes guests that run for guests that have yet to start."""
    pages = tuple(dataclasses.replace(claim, unused=claim.owned) for claim in taken.pages)
    return plan_guest(request, topology, dataclasses.replace(taken, pages=pages), policy)


def gives_the_hosts_share_away(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Knows of no reserved pages."""
    return plan_guest(request, topology, taken, dataclasses.replace(policy, reserved_pages=()))


def halves_cores(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Gives one thread of each core."""
    plan = plan_guest(request, topology, taken, policy)
    return dataclasses.replace(plan, cores=tuple(CpuSet.of([min(cpus.ids)]) for cpus in plan.cores))


def knows_no_nodes(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Takes cores wherever they are."""
    cores = tuple(dataclasses.replace(core, node=0) for core in topology.cores)
    return plan_guest(request, dataclasses.replace(topology, cores=cores), taken, policy)


def takes_any_port(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Takes every PF for an uplink, connected or not."""
    pfs = tuple(dataclasses.replace(pf, up=True) for pf in topology.pfs)
    everything = dataclasses.replace(policy, uplinks=tuple(pf.interface or "" for pf in pfs))
    return plan_guest(request, dataclasses.replace(topology, pfs=pfs), taken, everything)


def takes_the_lowest(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Sees no runs: takes whatever core comes first."""
    order = {core: number for number, core in enumerate(topology.cores)}
    cores = tuple(dataclasses.replace(core, socket=order[core]) for core in topology.cores)
    return plan_guest(request, dataclasses.replace(topology, cores=cores), taken, policy)


def gives_up_early(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Sees two guests and says that the host is full."""
    if len(taken.vfs) >= 2:
        raise NoRoom("full", ("as I say",))
    return plan_guest(request, topology, taken, policy)


def gives_no_reason(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Refuses without a word."""
    try:
        return plan_guest(request, topology, taken, policy)
    except NoRoom as error:
        raise NoRoom(error.message, ()) from None


def depends_on_the_order(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """The same facts in another order give another plan."""
    plan = plan_guest(request, topology, taken, policy)
    return dataclasses.replace(plan, image=ImageRef(str(topology.pools[0].page_size)))


def ignores_the_placement(request: GuestRequest, topology: Topology, taken: Allocated, policy: Policy) -> Plan:
    """Knows better."""
    return plan_guest(request.model_copy(update={"placement": None}), topology, taken, policy)


@pytest.mark.parametrize(
    ("planner", "machine"),
    [
        *((planner, GuestLives) for planner in (
            forgets_cpus, forgets_vfs, forgets_pages, gives_the_hosts_share_away, halves_cores, knows_no_nodes,
            takes_any_port, takes_the_lowest, gives_no_reason, depends_on_the_order, ignores_the_placement,
        )),
        *((planner, ScarceLives) for planner in (destroys_data, gives_up_early)),
        # These take the most lives. `destroys_data` and `forgets_pages` show in less that it looks at disks and pages.
        *(pytest.param(planner, ScarceLives, marks=pytest.mark.soak) for planner in (forgets_disks, counts_pages_twice)),
    ],
)  # fmt: skip
def test_the_machine_finds_a_broken_planner(planner: Planner, machine: type[GuestLives]) -> None:
    broken = type("Broken", (machine,), {"planner": staticmethod(planner)})
    # As found, not made smaller: nobody reads it. The same examples each time: the test must not pass or fail by luck.
    with pytest.raises(AssertionError):
        run(broken, examples=3000, phases=[Phase.generate], derandomize=True, database=None, report_multiple_bugs=False)
