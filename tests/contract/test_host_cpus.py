"""CPUs: what sysfs tells, and where the kernel lets a thread run. The affinity tests always ask the real kernel."""

from __future__ import annotations

import os
import subprocess
import threading
from errno import EINVAL, ENOENT, ESRCH

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cpus import read_affinity, read_cores, read_isolated, read_online, set_affinity
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet
from tests.fakeroot import FakeRoot

NO_SUCH_CPU = 8191  # the kernel's largest NR_CPUS is 8192


def test_the_cores_are_a_partition_of_the_online_cpus(host: HostRoot) -> None:
    cores = read_cores(host)
    listed = [cpu for core in cores for cpu in core.cpus]
    assert sorted(listed) == list(read_online(host))
    assert all(core.cpus for core in cores)


def test_the_siblings_agree_with_each_other(host: HostRoot) -> None:
    for core in read_cores(host):
        for cpu in core.cpus:
            assert CpuSet.parse(host.read(f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list")) == core.cpus


def test_the_nodes_list_the_cpus_that_say_they_are_on_them(host: HostRoot) -> None:
    cores = read_cores(host)
    for node in {core.node for core in cores}:
        listed = CpuSet.parse(host.read(f"sys/devices/system/node/node{node}/cpulist"))
        assert listed == CpuSet.of(cpu for core in cores if core.node == node for cpu in core.cpus)


def test_isolated_cpus_exist(host: HostRoot) -> None:
    assert read_isolated(host) <= CpuSet.parse(host.read("sys/devices/system/cpu/possible"))


def test_a_sibling_that_is_offline_is_not_handed_out(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/cpu/online", "0-6")
    assert read_cores(fake)[-1].cpus == CpuSet.of([6])


def test_cpus_isolated_by_a_cpuset_count_too(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/cpu/isolated", "2-3")
    fake.add("sys/fs/cgroup/cpuset.cpus.isolated", "6-7")
    assert read_isolated(fake) == CpuSet.of([2, 3, 6, 7])


def test_a_host_without_isolated_cpus(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/cpu/isolated")
    (fake.path / "sys/fs/cgroup/cpuset.cpus.isolated").unlink()
    assert read_isolated(fake) == CpuSet()


def test_a_cpu_without_topology_is_an_error_with_the_file(fake: FakeRoot) -> None:
    (fake.path / "sys/devices/system/cpu/cpu5/topology/core_cpus_list").unlink()
    fake.add("sys/devices/system/cpu/cpu4/topology/core_cpus_list", "4")
    with pytest.raises(HostError, match="cpu5/topology/core_cpus_list") as caught:
        read_cores(fake)
    assert caught.value.errno == ENOENT


def in_thread(work: object) -> None:
    """Runs the test's work in a thread of its own, so that the affinity of pytest's stays as it was."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_a_thread_is_confined_to_a_cpu() -> None:
    def work() -> None:
        tid = threading.get_native_id()
        one = CpuSet.of([min(os.sched_getaffinity(0))])
        set_affinity(tid, one)
        assert read_affinity(tid) == one == CpuSet.of(os.sched_getaffinity(0))

    in_thread(work)


def test_cpus_that_the_kernel_left_out_are_an_error_with_both_sets() -> None:
    def work() -> None:
        one = min(os.sched_getaffinity(0))
        with pytest.raises(HostError, match=rf"CPUs {one},{NO_SUCH_CPU}, but may run on {one}\n") as caught:
            set_affinity(threading.get_native_id(), CpuSet.of([one, NO_SUCH_CPU]))
        assert caught.value.errno == 0

    in_thread(work)


def test_no_cpu_that_is_online_is_an_error() -> None:
    with pytest.raises(HostError, match=str(NO_SUCH_CPU)) as caught:
        set_affinity(threading.get_native_id(), CpuSet.of([NO_SUCH_CPU]))
    assert caught.value.errno == EINVAL


def test_a_thread_that_has_ended_is_an_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for call in (lambda: read_affinity(ended.pid), lambda: set_affinity(ended.pid, CpuSet.of([0]))):
        with pytest.raises(HostError, match=str(ended.pid)) as caught:
            call()
        assert caught.value.errno == ESRCH


def test_a_per_cpu_kernel_thread_cannot_be_moved(real: HostRoot) -> None:
    tid = next(int(name) for name in real.names("proc") if name.isdecimal() and real.find(f"proc/{name}/comm") == "ksoftirqd/0")
    with pytest.raises(HostError, match="PF_NO_SETAFFINITY") as caught:
        set_affinity(tid, read_online(real))
    assert caught.value.errno == EINVAL
