"""Pools of huge pages. The kernel may allocate fewer than requested without an error."""

from __future__ import annotations

from errno import ENOENT
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host.hugepages import find_pool, read_pool_size, survey_pools
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import PagePool
from orchestrator.values import Size
from tests.fakes.root import FakeRoot, all_read, build_host

MIB2 = Size(2 << 20)


def read_pools(host: HostRoot) -> tuple[PagePool, ...]:
    return all_read(survey_pools(host))


def pool(host: HostRoot, node: int = 0) -> PagePool:
    """The pool of 2 MiB pages of a node."""
    return next(pool for pool in read_pools(host) if (pool.node, pool.page_size) == (node, MIB2))


def resize(host: HostRoot, pages: int, pools: str = "sys/devices/system/node/node0/hugepages") -> None:
    host.write(f"{pools}/hugepages-2048kB/nr_hugepages", str(pages))


def test_each_pool_is_read_once_with_valid_figures(host: HostRoot) -> None:
    pools = read_pools(host)
    assert pools
    assert all(0 <= pool.free <= pool.total for pool in pools)
    keys = [(pool.node, pool.page_size) for pool in pools]
    assert keys == sorted(set(keys))


def test_the_pools_of_the_nodes_add_up_to_the_kernels_total(real: HostRoot) -> None:
    total = int(real.read("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"))
    assert sum(pool.total for pool in read_pools(real) if pool.page_size == MIB2) == total


def test_a_pool_grows_and_shrinks(host: HostRoot) -> None:
    before = pool(host)
    resize(host, before.total + 1)
    try:
        assert (pool(host).total, pool(host).free) == (before.total + 1, before.free + 1)
    finally:
        resize(host, before.total)
    assert pool(host) == before


def test_pages_in_use_stay(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages", "100")
    used = pool(fake).total - 100
    resize(fake, 0)
    assert (pool(fake).total, pool(fake).free) == (used, 0)


@pytest.mark.parametrize(("node", "size"), [(99, MIB2), (0, Size(3 << 20))])
def test_no_such_pool(host: HostRoot, node: int, size: Size) -> None:
    assert find_pool(host, node, size) is None
    with pytest.raises(HostError, match=f"node{node}/hugepages/hugepages-{size.kib}kB") as caught:
        read_pool_size(host, node, size)
    assert caught.value.errno == ENOENT


def test_a_kernel_without_numa_has_one_node(tmp_path: Path) -> None:
    folder = "sys/kernel/mm/hugepages/hugepages-2048kB"
    flat = build_host(tmp_path, f"{folder}/nr_hugepages = 8\n{folder}/free_hugepages = 5")
    assert read_pools(flat) == (PagePool(0, MIB2, 8, 5),)
    resize(flat, 9, "sys/kernel/mm/hugepages")
    assert read_pools(flat) == (PagePool(0, MIB2, 9, 6),)


def test_a_kernel_without_huge_pages_has_no_pools(tmp_path: Path) -> None:
    assert read_pools(build_host(tmp_path, "sys/devices/system/node/node0/cpulist = 0")) == ()
