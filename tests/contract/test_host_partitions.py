"""Isolated partitions of control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import ENOENT

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cpus import read_online
from orchestrator.host.partitions import add_exclusive, exclusive_file, is_partition, list_parents, make_partition
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet
from tests.fakes.root import FakeRoot

ROOT = "sys/fs/cgroup"
OUTER = "nohype-partition.slice"
INNER = f"{OUTER}/vcpu0"


@pytest.fixture
def last(host: HostRoot) -> Iterator[CpuSet]:
    """The last CPU, and two groups, one in the other, that may use it."""
    if isinstance(host, FakeRoot):
        for group in (OUTER, INNER):
            host.add(f"{ROOT}/{group}/cpuset.cpus.exclusive")
            host.add(f"{ROOT}/{group}/cpuset.cpus.partition", "member")
    else:
        for group in (OUTER, INNER):
            os.mkdir(host.path / ROOT / group)
            if group == OUTER:
                host.write(f"{ROOT}/{OUTER}/cgroup.subtree_control", "+cpuset")
    yield CpuSet.of([max(read_online(host))])
    if not isinstance(host, FakeRoot):
        for group in (INNER, OUTER):
            os.rmdir(host.path / ROOT / group)


def test_partition_is_made_below_groups_with_the_cpus(host: HostRoot, last: CpuSet) -> None:
    assert list_parents(f"/{INNER}") == (OUTER,)
    add_exclusive(host, OUTER, last)
    assert not is_partition(host, INNER)
    make_partition(host, INNER, last)
    assert is_partition(host, f"/{INNER}")
    make_partition(host, INNER, last)
    assert is_partition(host, INNER)


def test_partition_whose_parent_lacks_the_cpus_is_refused_with_the_kernels_reason(host: HostRoot, last: CpuSet) -> None:
    with pytest.raises(HostError, match=r"requested an isolated partition of CPUs .*, the kernel says 'isolated invalid \("):
        make_partition(host, INNER, last)
    assert host.read(f"{ROOT}/{INNER}/cpuset.cpus.partition") == "member"


def test_exclusive_cpus_are_added_to_those_there(host: HostRoot, last: CpuSet) -> None:
    first = CpuSet.of([max(last) - 1])
    add_exclusive(host, OUTER, first)
    add_exclusive(host, OUTER, last)
    assert CpuSet.parse(host.read(exclusive_file(OUTER))) == first | last
    host.write(exclusive_file(OUTER), "\n")
    assert host.read(exclusive_file(OUTER)) == ""


def test_kernel_without_remote_partitions_says_what_to_do(host: HostRoot) -> None:
    for change in (add_exclusive, make_partition):
        with pytest.raises(HostError, match=r"nohype-nowhere.*\n.*isolcpus=") as caught:
            change(host, "nohype-nowhere", CpuSet.of([0]))
        assert caught.value.errno == ENOENT
