"""Control groups of caches and memory bandwidth. Emulated servers have none: there only their absence is tested."""

from __future__ import annotations

import errno

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cache import find_group, make_group, read_caches, read_use, remove_group, set_cpus, set_limits
from orchestrator.host.root import HostRoot
from orchestrator.model.cache import BandwidthUnit
from orchestrator.values import CpuSet
from tests.fakes import resctrl
from tests.fakes.root import FakeRoot

CACHES = {0: "0-3", 1: "4-7"}


@pytest.fixture
def limited(fake: FakeRoot) -> FakeRoot:
    resctrl.add_caches(fake, CACHES)
    resctrl.mount(fake, CACHES)
    return fake


def test_host_without_it_says_why(host: HostRoot) -> None:
    if host.exists("sys/fs/resctrl/info"):
        pytest.skip("the host has resctrl")
    assert "/sys/fs/resctrl" in read_caches(host).fault


def test_unmounted_host_says_how_to_mount(fake: FakeRoot) -> None:
    (fake.path / "sys/fs/resctrl").mkdir(parents=True)
    assert read_caches(fake).fault == "resctrl is not mounted; mount it: mount -t resctrl resctrl /sys/fs/resctrl"
    with pytest.raises(HostError, match="resctrl is not mounted"):
        make_group(fake, "one")


def test_host_that_only_monitors(fake: FakeRoot) -> None:
    resctrl.mount(fake, CACHES, ways=0, bandwidth="")
    assert "not limit them" in read_caches(fake).fault


def test_survey(limited: FakeRoot) -> None:
    found = read_caches(limited)
    assert not found.fault
    assert found.cache
    assert (found.cache.level, found.cache.lines, found.cache.full, found.cache.min_ways) == (3, ("L3",), 0xFFF, 1)
    assert found.bandwidth
    assert (found.bandwidth.unit, found.bandwidth.minimum, found.bandwidth.step) == (BandwidthUnit.PERCENT, 10, 10)
    assert [(one.level, one.id, str(one.cpus)) for one in found.domains] == [(3, 0, "0-3"), (3, 1, "4-7")]
    assert [(group.name, str(group.cpus)) for group in found.groups] == [("", "0-7")]
    assert found.max_groups == 16


@pytest.mark.parametrize("unit", list(BandwidthUnit))
def test_unit_of_bandwidth(fake: FakeRoot, unit: BandwidthUnit) -> None:
    resctrl.mount(fake, CACHES, bandwidth={"percent": "percent"}.get(unit, unit))
    found = read_caches(fake).bandwidth
    assert found
    assert found.unit is unit


def test_code_and_data_apart(fake: FakeRoot) -> None:
    resctrl.mount(fake, CACHES, cdp=True)
    cache = read_caches(fake).cache
    assert cache
    assert cache.lines == ("L3CODE", "L3DATA")


def test_group_has_its_cpus_and_limits(limited: FakeRoot) -> None:
    make_group(limited, "one")
    make_group(limited, "one")
    set_limits(limited, "one", {"L3": {0: 0xF00}, "MB": {0: 50}})
    set_cpus(limited, "one", CpuSet.parse("2-3"))
    group = find_group(limited, "one")
    assert group
    assert (group.find("L3", 0), group.find("MB", 0), group.find("MB", 1), str(group.cpus)) == (0xF00, 50, 100, "2-3")
    default = find_group(limited, "")
    assert default
    assert str(default.cpus) == "0-1,4-7"
    remove_group(limited, "one")
    remove_group(limited, "one")
    assert find_group(limited, "one") is None
    assert str(read_caches(limited).groups[0].cpus) == "0-7"


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"L3": {0: 0b1011}}, "non-consecutive 1-bits"),
        ({"L3": {0: 0x1FFF}}, "Mask out of range"),
        ({"L3": {0: 0}}, "Mask out of range"),
        ({"L2": {0: 1}}, "Unknown or unsupported resource name 'L2'"),
        ({"MB": {0: 5}}, "out of range"),
    ],
)
def test_refusal_has_the_reason_of_the_kernel(limited: FakeRoot, limits: dict[str, dict[int, int]], says: str) -> None:
    before = limited.tree()
    with pytest.raises(HostError) as caught:
        set_limits(limited, "", limits)
    assert says in caught.value.message
    changed = {name for name in before if before[name] != limited.tree()[name]}
    assert changed == {"sys/fs/resctrl/info/last_cmd_status"}


def test_limit_that_the_kernel_rounds_is_noticed(limited: FakeRoot) -> None:
    with pytest.raises(HostError, match="45 was written for MB:0 .* but it is 50"):
        set_limits(limited, "", {"MB": {0: 45}})


def test_all_groups_in_use(fake: FakeRoot) -> None:
    resctrl.mount(fake, CACHES, closids=2)
    make_group(fake, "one")
    with pytest.raises(HostError, match="cannot create the control group two: all are in use"):
        make_group(fake, "two")


def test_cpu_that_is_offline(limited: FakeRoot) -> None:
    make_group(limited, "one")
    with pytest.raises(HostError, match="Can only assign online CPUs"):
        set_cpus(limited, "one", CpuSet.parse("9"))


@pytest.mark.parametrize("text", ["L3:0=xyz", "nonsense", "L3"])
def test_unknown_format_is_an_error(limited: FakeRoot, text: str) -> None:
    limited.add("sys/fs/resctrl/schemata", text)
    with pytest.raises(HostError, match="cannot parse /sys/fs/resctrl/schemata"):
        read_caches(limited)


def test_use_is_summed_over_the_caches(limited: FakeRoot) -> None:
    make_group(limited, "one")
    texts = {"mon_L3_00/llc_occupancy": "1000", "mon_L3_01/llc_occupancy": "24", "mon_L3_00/mbm_total_bytes": "Unavailable"}
    resctrl.show(limited, "one", {**texts, "mon_L3_01/mbm_total_bytes": "7"})
    assert read_use(limited, "one") == {"llc_occupancy": 1024}
    assert read_use(limited, "two") == {}


def test_use_with_parts_of_nodes_counts_nothing_twice(limited: FakeRoot) -> None:
    """Sub-NUMA Cluster: mon_data/mon_L3_00 has a folder per node beside the sums."""
    make_group(limited, "one")
    texts = {"mon_L3_00/llc_occupancy": "1000", "mon_L3_00/mon_sub_L3_00/llc_occupancy": "600"}
    resctrl.show(limited, "one", {**texts, "mon_L3_00/mon_sub_L3_01/llc_occupancy": "400"})
    assert read_use(limited, "one") == {"llc_occupancy": 1000}


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
def test_use_of_a_group_that_is_being_removed(limited: FakeRoot, number: int) -> None:
    make_group(limited, "one")
    resctrl.show(limited, "one", {"mon_L3_00/llc_occupancy": "1000"})
    limited.read_errors["sys/fs/resctrl/one/mon_data/mon_L3_00/llc_occupancy"] = number
    assert read_use(limited, "one") == {}
    limited.read_errors["sys/fs/resctrl/one/schemata"] = number
    assert [group.name for group in read_caches(limited).groups] == [""]


def test_group_of_another_program_that_has_no_ways_yet(limited: FakeRoot) -> None:
    """In the mode pseudo-locksetup."""
    make_group(limited, "other")
    limited.add("sys/fs/resctrl/other/schemata", "    L3:uninitialized\n    MB:uninitialized")
    assert [(group.name, group.schemata) for group in read_caches(limited).groups[1:]] == [("other", ())]


def test_threads_of_a_group(limited: FakeRoot) -> None:
    make_group(limited, "one")
    limited.add("sys/fs/resctrl/one/tasks", "12\n4711")
    (group,) = read_caches(limited).groups[1:]
    assert (group.has_tasks, group.tasks) == (True, {12, 4711})


def test_groups_are_limited_by_each_resource(limited: FakeRoot) -> None:
    limited.add("sys/fs/resctrl/info/L2/num_closids", "4")
    limited.add("sys/fs/resctrl/info/L2/cbm_mask", "ff")
    assert read_caches(limited).max_groups == 4
