"""What only the checks of a server read: IOMMUs, frequencies, idle states, memory controllers, interfaces by their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host import netlink
from orchestrator.host.cgroups import is_version_1, read_controllers
from orchestrator.host.cpus import read_online, shows_devices, survey_cores
from orchestrator.host.frequency import IdleState, read_governors, read_idle_states, read_latency_limit
from orchestrator.host.iommu import IommuUnit, is_visible, read_iommu_groups, read_units
from orchestrator.host.link_files import FileNet, read_links
from orchestrator.host.memory import read_hugetlb_mounts, read_memory_errors, read_memory_nodes
from orchestrator.host.pci import shows_drivers
from orchestrator.host.processor import read_capacities
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet, MacAddress, Size
from tests.fakes.root import FakeRoot

FILES = {
    "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nhugetlbfs /dev/hugepages hugetlbfs rw,pagesize=2M 0 0",
    "sys/class/iommu/ivhd0/amd-iommu/features": "246577efa2254afa:0",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "performance",
    "sys/devices/system/cpu/cpufreq/policy0/affected_cpus": "0 1",
    "sys/devices/system/cpu/cpuidle/current_driver": "none",
    "sys/devices/system/node/has_memory": "0-1",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids",
    "sys/kernel/mm/ksm/run": "0",
    "sys/class/net/lo/ifindex": "1",
    "sys/class/net/lo/flags": "0x9",
    "sys/class/net/lo/type": "772",
    "sys/class/net/lo/address": "00:00:00:00:00:00",
    "sys/class/net/lo/carrier": "1",
}


@pytest.fixture
def filled(host: HostRoot) -> HostRoot:
    if isinstance(host, FakeRoot):
        for name, text in FILES.items():
            host.add(name, text)
    return host


def test_host_shows_what_every_kernel_has(filled: HostRoot) -> None:
    assert is_visible(filled)
    assert shows_devices(filled)
    assert shows_drivers(filled)
    assert is_version_1(filled) is False
    assert read_controllers(filled)


def test_units_of_the_iommu_are_read(filled: HostRoot) -> None:
    units = read_units(filled)
    assert bool(units) == bool(read_iommu_groups(filled))
    assert {unit.kind for unit in units} <= {"VT-d", "AMD-Vi", "other"}


def test_power_of_cpus_is_read(filled: HostRoot) -> None:
    governors = read_governors(filled)
    assert governors is None or all(cpus for cpus in governors.values())
    for cpu in read_online(filled):
        states = read_idle_states(filled, cpu)
        assert states is None or [state.latency for state in states] == sorted(state.latency for state in states)
    assert len(read_capacities(filled, read_online(filled))) <= 1


def test_latency_limit_is_read_as_root(real: HostRoot) -> None:
    limit = read_latency_limit(real)
    assert limit is not None
    assert limit >= 0


def test_memory_of_nodes_and_mounts_are_read(filled: HostRoot) -> None:
    nodes = {core.node for core in survey_cores(filled)[0]}
    assert nodes <= (read_memory_nodes(filled) or CpuSet()).ids
    assert all(mount.page_size for mount in read_hugetlb_mounts(filled))
    assert all(found.uncorrected >= 0 for found in read_memory_errors(filled))


def test_interfaces_by_files_are_those_of_netlink(real: HostRoot) -> None:
    def key(name: str, **fields: object) -> tuple[object, ...]:
        return name, *fields.values()

    files = {key(one.name, index=one.index, mac=one.mac, up=one.up, mtu=one.mtu, ether=one.ethernet) for one in read_links(real)}
    every = netlink.read_links()
    assert files == {key(one.name, index=one.index, mac=one.mac, up=one.up, mtu=one.mtu, ether=one.ethernet) for one in every}
    physical = {one.name for one in every if one.kind is None and one.name != "lo"}
    assert {one.name for one in read_links(real) if one.kind is None} == physical


@pytest.mark.parametrize(
    ("file", "text", "unit"),
    [
        ("intel-iommu/cap", "8d2078c106f0466", IommuUnit("unit0", "VT-d", posts_interrupts=True)),
        ("intel-iommu/cap", "d2078c106f0466", IommuUnit("unit0", "VT-d", posts_interrupts=False)),
        ("amd-iommu/features", "f77ef22294ada", IommuUnit("unit0", "AMD-Vi", posts_interrupts=True)),
        ("amd-iommu/features", "0:f77ef22294ada", IommuUnit("unit0", "AMD-Vi", posts_interrupts=True)),
        ("amd-iommu/features", "29d3:0", IommuUnit("unit0", "AMD-Vi", posts_interrupts=False)),
        ("other", "", IommuUnit("unit0", "other", posts_interrupts=None)),
    ],
)
def test_unit_tells_whether_it_posts_interrupts(fake: FakeRoot, file: str, text: str, unit: IommuUnit) -> None:
    fake.add(f"sys/class/iommu/unit0/{file}", text)
    assert unit in read_units(fake)


@pytest.mark.parametrize("text", ["-", "", "x:y"])
def test_unit_with_an_odd_register_is_there_all_the_same(fake: FakeRoot, text: str) -> None:
    fake.add("sys/class/iommu/dmar0/intel-iommu/cap", text)
    assert IommuUnit("dmar0", "VT-d", posts_interrupts=None) in read_units(fake)


def test_disabled_idle_states_are_left_out(fake: FakeRoot) -> None:
    for number, (name, latency, disable) in enumerate((("POLL", 0, 0), ("C1", 2, 0), ("C6", 133, 1))):
        for file, value in (("name", name), ("latency", latency), ("disable", disable)):
            fake.add(f"sys/devices/system/cpu/cpu0/cpuidle/state{number}/{file}", str(value))
    assert read_idle_states(fake, 0) == (IdleState("POLL", 0), IdleState("C1", 2))
    assert read_idle_states(fake, 1) is None
    fake.add("dev/cpu_dma_latency")
    (fake.path / "dev/cpu_dma_latency").write_bytes(b"\x14\x00\x00\x00")
    assert read_latency_limit(fake) == 20


def test_size_of_pages_of_a_mount(fake: FakeRoot) -> None:
    fake.add(
        "proc/mounts", "none /a hugetlbfs rw,pagesize=1024M 0 0\nnone /b hugetlbfs rw 0 0\nnone /c hugetlbfs rw,pagesize=x 0 0"
    )
    assert [mount.page_size for mount in read_hugetlb_mounts(fake)] == [Size(1 << 30), None, None]
    fake.add("proc/meminfo", "MemTotal: 1 kB\nHugepagesize:       2048 kB")
    assert read_hugetlb_mounts(fake)[1].page_size == Size(2 << 20)


def test_nodes_of_cpus_without_links_are_known_by_their_lists(fake: FakeRoot) -> None:
    for link in fake.path.glob("sys/devices/system/cpu/cpu*/node*"):
        link.unlink()
    assert [core.node for core in survey_cores(fake)[0]] == [0, 0, 1, 1]


def test_version_of_control_groups_by_mounts(fake: FakeRoot) -> None:
    for text, version_1 in (
        ("proc /proc proc rw 0 0", None),
        ("cgroup /c cgroup rw 0 0", True),
        ("cgroup2 /c cgroup2 rw 0 0", False),
    ):
        fake.add("proc/mounts", text)
        assert is_version_1(fake) is version_1


def test_interface_by_its_files(fake: FakeRoot) -> None:
    fake.add("sys/class/net/bonding_masters", "bond0")
    for name, text in {"ifindex": "7", "flags": "0x1103", "type": "1", "address": "02:00:00:00:00:07", "carrier": "1"}.items():
        fake.add(f"sys/class/net/br0/{name}", text)
    fake.add("sys/class/net/br0/uevent", "DEVTYPE=bridge\nINTERFACE=br0")
    (found,) = (link for link in FileNet(fake).read_links() if link.name == "br0")
    assert (found.kind, found.up, found.carrier) == ("bridge", True, True)
    assert found.mac == MacAddress.parse("02:00:00:00:00:07")
    with pytest.raises(HostError, match="pyroute2 is not installed"):
        FileNet(fake).read_vfs("br0")


def test_folder_of_interfaces_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="network interfaces cannot be listed"):
        read_links(HostRoot(tmp_path))
