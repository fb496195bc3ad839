"""Planning of caches and memory bandwidth: which ways a guest gets, and why it gets none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import NoRoom, RequestError
from orchestrator.model.cache import (
    BandwidthControl,
    BandwidthUnit,
    CacheControl,
    CacheDomain,
    CachePlan,
    CacheShare,
    CacheSurvey,
    ControlGroup,
    find_runs,
    name_group,
    parse_bandwidth,
)
from orchestrator.model.plan import Allocated, Plan, Policy
from orchestrator.model.request import parse_guest_request
from orchestrator.model.topology import Core, IommuGroup, PagePool, PhysicalFunction, Topology
from orchestrator.model.waiver import Waiver
from orchestrator.planning.planner import plan_guest
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

M2 = Size.parse("2M")
POLICY = Policy(CpuSet.parse("0-1"), ("nic0",), M2)
CONTROL = CacheControl(3, ("L3",), 0xFFF, 1, 0, sparse=False)
PERCENT = BandwidthControl(BandwidthUnit.PERCENT, 10, 10, 100)
DOMAINS = (CacheDomain(3, 0, CpuSet.parse("0-3")), CacheDomain(3, 1, CpuSet.parse("4-7")))


def group(name: str, first: int, second: int = 0xFFF, cpus: str = "", *, has_tasks: bool = False) -> ControlGroup:
    return ControlGroup(name, (("L3", ((0, first), (1, second))),), CpuSet.parse(cpus), has_tasks)


def survey(*groups: ControlGroup, **changes: object) -> CacheSurvey:
    made = CacheSurvey("", CONTROL, PERCENT, DOMAINS, (group("", 0xFFF, cpus="0-7"), *groups), 16)
    return replace(made, **changes)  # type: ignore[arg-type]


def host(caches: CacheSurvey | None) -> Topology:
    """The cores 0-1 and 2-3 share a cache, 4-5 and 6-7 another one; all are on one node."""
    address = PciAddress.parse("0000:41:00.0")
    pf = PhysicalFunction(address, "nic0", "8086:10c9", "igb", None, True, MacAddress.parse("52:54:00:00:01:00"), 7, 128, 2, ())
    cores = tuple(Core(CpuSet.of((2 * number, 2 * number + 1)), 0, 0) for number in range(4))
    pools, groups = (PagePool(0, M2, 256, 256),), (IommuGroup(9, "DMA", (address,)),)
    return Topology(cores, CpuSet.parse("2-7"), pools, (pf,), groups, caches=caches)


def plan(caches: CacheSurvey | None, taken: Allocated | None = None, policy: Policy = POLICY, **fields: object) -> Plan:
    request = parse_guest_request({"name": "g1", "memory": "4M", "image": "minimal", **fields})
    return plan_guest(request, host(caches), taken or Allocated(), policy)


def masks(made: Plan) -> dict[int, int]:
    assert made.caches
    return {share.id: share.mask for share in made.caches.shares}


def test_guest_without_a_limit_has_none() -> None:
    assert plan(None).caches is None


def test_upper_ways_of_the_caches_of_its_cores() -> None:
    assert masks(plan(survey(), cache_ways=4)) == {0: 0xF00}
    assert masks(plan(survey(), cache_ways=4, cores=3)) == {0: 0xF00, 1: 0xF00}


def test_ways_of_other_guests_stay_theirs() -> None:
    other = CachePlan(3, (CacheShare(0, 0xF00),))
    assert masks(plan(survey(), Allocated(caches={"g0": other}), cache_ways=4)) == {0: 0x0F0}
    # Its group shows all ways of the other cache, as the kernel makes groups.
    shown = survey(group(name_group("g0"), 0xF00, 0xFFF, "2-3"))
    taken = Allocated(CpuSet.parse("2-3"), caches={"g0": other})
    assert masks(plan(shown, taken, cache_ways=4)) == {1: 0xF00}


def test_ways_of_other_programs_stay_theirs() -> None:
    assert masks(plan(survey(group("db", 0xC00, has_tasks=True)), cache_ways=4)) == {0: 0x3C0}


def test_smallest_gap_is_filled_first() -> None:
    left = replace(survey(), groups=(group("", 0x00F), group("db", 0x0C0, has_tasks=True)))
    # Free are 0x03F and 0xF00.
    assert masks(plan(left, cache_ways=3)) == {0: 0xE00}


def test_ways_that_devices_fill_are_left_out() -> None:
    control = replace(CONTROL, shared=0xC00)
    assert masks(plan(survey(cache=control), cache_ways=4)) == {0: 0x3C0}


def test_host_keeps_the_minimum() -> None:
    control = replace(CONTROL, min_ways=2)
    assert masks(plan(survey(cache=control), cache_ways=10)) == {0: 0xFFC}
    with pytest.raises(NoRoom) as caught:
        plan(survey(cache=control), cache_ways=11)
    assert "L3 cache 0: 11 neighbouring ways requested, at most 12 of 12 are free, of which the host keeps 2" in str(caught.value)
    with pytest.raises(NoRoom, match="a group has at least 2 ways, 1 requested"):
        plan(survey(cache=control), cache_ways=1)


def test_another_node_is_chosen_if_its_cache_has_room() -> None:
    topology = host(survey(group("db", 0xFFE, 0x001, has_tasks=True)))
    cores = tuple(replace(core, node=number // 2) for number, core in enumerate(topology.cores))
    pools = (*topology.pools, PagePool(1, M2, 256, 256))
    request = parse_guest_request({"name": "g1", "memory": "4M", "image": "minimal", "cache_ways": 4})
    made = plan_guest(request, replace(topology, cores=cores, pools=pools), Allocated(), POLICY)
    assert (made.node, masks(made)) == (1, {1: 0xF00})


def test_all_control_groups_are_used() -> None:
    with pytest.raises(NoRoom, match=r"all 2 control groups \(CLOSIDs\) of this host are used"):
        plan(survey(group("db", 0x001), max_groups=2), cache_ways=1)
    stopped = Allocated(caches={"g0": CachePlan(3, (CacheShare(0, 1),))})
    with pytest.raises(NoRoom, match="all 2 control groups"):
        plan(survey(max_groups=2), stopped, cache_ways=1)
    waived = Allocated(caches={"g0": CachePlan()})
    assert masks(plan(survey(max_groups=2), waived, cache_ways=1)) == {0: 0x800}


@pytest.mark.parametrize(
    ("caches", "fields", "says"),
    [
        (CacheSurvey("resctrl is not mounted"), {"cache_ways": 2}, "resctrl is not mounted"),
        (survey(cache=None), {"cache_ways": 2}, "cannot allocate cache ways"),
        (survey(bandwidth=None), {"bandwidth": "40%"}, "cannot limit memory bandwidth"),
        (survey(), {"bandwidth": "4000MB/s"}, "limits memory bandwidth in percent, requested 4000MB/s"),
        (survey(bandwidth=BandwidthControl(BandwidthUnit.EIGHTH_GB, 1, 1, 2048)), {"bandwidth": "40%"}, "in MB/s, requested 40%"),
        (survey(bandwidth=replace(PERCENT, minimum=20)), {"bandwidth": "7%"}, "only 20% to 100%"),
    ],
)
def test_host_that_cannot_limit_is_refused_or_accepted(caches: CacheSurvey, fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan(caches, **fields)
    assert says in caught.value.message
    assert caught.value.hint == "omit cache_ways and bandwidth, or accept it: --accept shared-cache"
    for made in (
        plan(caches, accept=["shared-cache"], **fields),
        plan(caches, policy=replace(POLICY, accept=tuple(Waiver)), **fields),
    ):
        assert made.caches == CachePlan()
        assert made.waived == (Waiver.SHARED_CACHE,)


def test_accepting_it_does_not_replace_ways_that_are_not_free() -> None:
    with pytest.raises(NoRoom):
        plan(survey(), cache_ways=12, accept=["shared-cache"])


@pytest.mark.parametrize(
    ("control", "text", "value"),
    [
        (PERCENT, "40%", 40),
        (PERCENT, "41%", 50),
        (BandwidthControl(BandwidthUnit.EIGHTH_GB, 1, 1, 2048), "4000MB/s", 32),
        (BandwidthControl(BandwidthUnit.EIGHTH_GB, 0, 1, 2048), "4001MB/s", 33),
        (BandwidthControl(BandwidthUnit.EIGHTH_GB, 0, 1, 2048), "1MB/s", 1),
        (BandwidthControl(BandwidthUnit.MEGABYTES, 10, 10, 1 << 31), "4001MB/s", 4010),
    ],
)
def test_bandwidth_in_the_unit_of_the_host(control: BandwidthControl, text: str, value: int) -> None:
    made = plan(survey(bandwidth=control), bandwidth=text, cores=3).caches
    assert made
    assert (made.bandwidth, made.unit, made.throttled, made.shares) == (value, control.unit, (0, 1), ())


@pytest.mark.parametrize("text", ["", "40", "0%", "101%", "4 MB/s", "4000MB", "-1%", "1e3MB/s", "٤٠%", "9999999999MB/s"])
def test_malformed_bandwidth(text: str) -> None:
    with pytest.raises(ValueError, match="use the form 40% or 4000MB/s"):
        parse_bandwidth(text)


def test_runs_of_a_mask() -> None:
    assert list(find_runs(0b1110_0110_01)) == [0b1, 0b11000, 0b1110000000]
    assert list(find_runs(0)) == []
