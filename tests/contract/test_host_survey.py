"""The whole survey: that it is made of its parts, and what it says of hosts of several shapes."""

from __future__ import annotations

from errno import ENOENT
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cpus import read_isolated, read_topoext, survey_cores
from orchestrator.host.hugepages import survey_pools
from orchestrator.host.iommu import read_iommu_groups
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_pfs, set_numvfs
from orchestrator.host.survey import read_topology, refresh_topology
from orchestrator.model.topology import Core, PagePool, PhysicalFunction, PromisedPages, VirtualFunction
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size
from tests.contract.conftest import await_link
from tests.fakes.root import DEVICES, FakeRoot, all_read, load_host

MIB2, GIB1 = Size(2 << 20), Size(1 << 30)


def cores(*rows: tuple[str, int, int]) -> tuple[Core, ...]:
    """Cores from (CPUs, socket, node)."""
    return tuple(Core(CpuSet.parse(cpus), socket, node) for cpus, socket, node in rows)


def test_the_survey_is_made_of_its_parts(host: HostRoot) -> None:
    topology = read_topology(host)
    assert topology.cores == all_read(survey_cores(host))
    assert topology.isolated == read_isolated(host)
    assert topology.pools == all_read(survey_pools(host))
    assert topology.pfs == read_pfs(host)
    assert topology.iommu_groups == read_iommu_groups(host)
    assert topology.topoext == read_topoext(host)
    assert topology.cpus


def test_a_survey_changes_nothing(fake: FakeRoot) -> None:
    before = fake.tree()
    read_topology(fake)
    assert fake.writes == []
    assert fake.tree() == before


@pytest.mark.parametrize("missing", ["sys/devices/system/cpu/online", "sys/bus/pci/devices"])
def test_a_host_without_sysfs_is_no_host(fake: FakeRoot, missing: str) -> None:
    (fake.path / missing).rename(fake.path / "gone")
    with pytest.raises(HostError, match=f"/{missing} is missing") as caught:
        read_topology(fake)
    assert caught.value.errno == ENOENT


def test_two_sockets_two_nodes_smt(tmp_path: Path) -> None:
    """The lab `numa` just after boot."""
    topology = read_topology(load_host(tmp_path, "numa"))
    assert topology.cores == cores(("0-1", 0, 0), ("2-3", 0, 0), ("4-5", 1, 1), ("6-7", 1, 1))
    assert topology.isolated == CpuSet.parse("2-7")
    assert topology.pools == (
        PagePool(0, MIB2, 256, 256), PagePool(0, GIB1, 0, 0), PagePool(1, MIB2, 256, 256), PagePool(1, GIB1, 0, 0)
    )  # fmt: skip
    address = PciAddress.parse("0000:41:00.0")
    mac = MacAddress("52:54:00:00:01:00")
    assert topology.pfs == (PhysicalFunction(address, "nic0", "8086:10c9", "igb", 0, True, mac, 7, 128, 2, ()),)
    assert {group.type for group in topology.iommu_groups} == {"DMA"}
    assert len(topology.iommu_groups) == 9


def test_the_same_with_two_guests(tmp_path: Path) -> None:
    """The lab `numa` with four VFs, two of them in guests of 256 MiB, one on each node."""
    topology = read_topology(load_host(tmp_path, "numa-guests"))
    assert [(pool.total, pool.free) for pool in topology.pools if pool.page_size == MIB2] == [(256, 128), (256, 128)]
    assert topology.pfs[0].vfs == tuple(
        VirtualFunction(PciAddress.parse(f"41:10.{2 * index}"), index, "vfio-pci" if index < 2 else None, 9 + index)
        for index in range(4)
    )


def test_one_socket_without_smt_and_iommu(tmp_path: Path) -> None:
    """A small server with a two-port I350, one port without a cable, the other in use, and firmware that knows no nodes."""
    topology = read_topology(load_host(tmp_path, "plain"))
    assert topology.cores == cores(*((str(cpu), 0, 0) for cpu in range(4)))
    assert topology.isolated == CpuSet()
    assert topology.pools == (PagePool(0, MIB2, 64, 64),)
    assert topology.iommu_groups == ()
    first, second = topology.pfs
    assert (first.interface, first.device, first.node, first.up, len(first.vfs)) == ("eno1", "8086:1521", None, True, 1)
    assert (first.vfs[0].address, first.vfs[0].driver, first.vfs[0].iommu_group) == (PciAddress.parse("04:10.0"), "igbvf", None)
    assert (second.interface, second.up, second.vfs) == ("eno2", False, ())
    assert second.vf_address(1) == PciAddress.parse("04:10.5")


def test_an_earlier_survey_is_brought_up_to_date(host: HostRoot, pf: PhysicalFunction) -> None:
    """Without new VFs it is the same survey; with new ones everything is read again."""
    set_numvfs(host, pf.address, 0)
    await_link(host)
    known = read_topology(host)
    assert refresh_topology(host, known) == known
    set_numvfs(host, pf.address, 2)
    await_link(host)
    assert refresh_topology(host, known) == read_topology(host) != known


def test_what_changes_from_guest_to_guest_is_read_again(fake: FakeRoot, pf: PhysicalFunction) -> None:
    known = read_topology(fake)
    fake.add("sys/devices/system/node/node1/hugepages/hugepages-2048kB/free_hugepages", "9")
    fake.add(f"{DEVICES}/{pf.address}/net/nic0/carrier", "0")
    fake.add("sys/fs/cgroup/cpuset.cpus.isolated", "1")
    now = refresh_topology(fake, known)
    assert now == read_topology(fake)
    assert ([pool.free for pool in now.pools if pool.node == 1][0], now.pfs[0].up, 1 in now.isolated) == (9, False, True)


def test_other_cpus_are_another_host(fake: FakeRoot) -> None:
    known = read_topology(fake)
    fake.add("sys/devices/system/cpu/online", "0-5")
    assert [str(core.cpus) for core in refresh_topology(fake, known).cores] == ["0-1", "2-3", "4-5"]


def test_what_the_kernel_offers_and_what_it_was_told(host: HostRoot) -> None:
    topology = read_topology(host)
    assert topology.kvm, "the fake hosts and the lab have it"
    assert topology.cpus <= topology.possible
    assert "root=" in topology.cmdline
    assert topology.problems == ()


def test_pages_that_are_promised_are_read_again(fake: FakeRoot) -> None:
    known = read_topology(fake)
    assert known.promised == ()
    fake.add("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "7")
    assert refresh_topology(fake, known).promised == read_topology(fake).promised == (PromisedPages(MIB2, 7),)


def test_one_cpu_and_one_pool_that_cannot_be_read_hide_no_other(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/cpu/cpu0/topology/core_cpus_list", "0")
    (fake.path / "sys/devices/system/cpu/cpu1/topology/core_cpus_list").unlink()
    fake.add("sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "?")
    topology = read_topology(fake)
    assert [str(core.cpus) for core in topology.cores] == ["0", "2-3", "4-5", "6-7"]
    assert [(pool.node, pool.page_size) for pool in topology.pools] == [(0, GIB1), (1, MIB2), (1, GIB1)]
    assert len(topology.problems) == 2
    fake.add("sys/devices/system/cpu/cpu0/topology/core_cpus_list", "0-1")
    fake.add("sys/devices/system/cpu/cpu1/topology/core_cpus_list", "0-1")
    fake.add("sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "256")
    assert refresh_topology(fake, topology).problems == (), "it was so for a moment"
