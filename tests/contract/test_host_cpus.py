"""CPUs: what sysfs tells, and where the kernel lets a thread run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from errno import EINVAL, ENOENT, ESRCH

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cpus import (
    read_affinity,
    read_isolated,
    read_online,
    read_possible,
    read_present,
    read_topoext,
    set_affinity,
    survey_cores,
)
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet
from tests.fakes.root import FakeRoot, all_read

NO_SUCH_CPU = 8191  # the kernel's largest NR_CPUS is 8192
PF_NO_SETAFFINITY = 0x0400_0000  # include/linux/sched.h


def test_the_cores_are_a_partition_of_the_online_cpus(host: HostRoot) -> None:
    cores = all_read(survey_cores(host))
    listed = [cpu for core in cores for cpu in core.cpus]
    assert sorted(listed) == list(read_online(host))
    assert all(core.cpus for core in cores)


def test_the_siblings_agree_with_each_other(host: HostRoot) -> None:
    for core in all_read(survey_cores(host)):
        for cpu in core.cpus:
            assert CpuSet.parse(host.read(f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list")) == core.cpus


def test_the_nodes_list_the_cpus_that_say_they_are_on_them(host: HostRoot) -> None:
    cores = all_read(survey_cores(host))
    for node in {core.node for core in cores}:
        listed = CpuSet.parse(host.read(f"sys/devices/system/node/node{node}/cpulist"))
        assert listed == CpuSet.of(cpu for core in cores if core.node == node for cpu in core.cpus)


def test_isolated_cpus_exist(host: HostRoot) -> None:
    assert read_isolated(host) <= CpuSet.parse(host.read("sys/devices/system/cpu/possible"))


def test_a_sibling_that_is_offline_is_not_handed_out(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/cpu/online", "0-6")
    assert all_read(survey_cores(fake))[-1].cpus == CpuSet.of([6])


def test_cpus_isolated_by_a_cpuset_count_too(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/cpu/isolated", "2-3")
    fake.add("sys/fs/cgroup/cpuset.cpus.isolated", "6-7")
    assert read_isolated(fake) == CpuSet.of([2, 3, 6, 7])


@pytest.mark.parametrize("file", ["online", "isolated", "possible", "present"])
def test_a_list_that_is_not_understood_is_the_hosts_error(fake: FakeRoot, file: str) -> None:
    """And not the client's, as that of a request would be."""
    fake.add(f"sys/devices/system/cpu/{file}", "(null)")
    with pytest.raises(HostError, match=f"cannot parse /.*cpu/{file}"):
        {"online": read_online, "isolated": read_isolated, "possible": read_possible, "present": read_present}[file](fake)


def test_present_cpus_are_possible_and_have_the_online_ones(host: HostRoot) -> None:
    if isinstance(host, FakeRoot):
        host.add("sys/devices/system/cpu/possible", "0-15")
        host.add("sys/devices/system/cpu/present", "0-8")
    assert read_online(host) <= read_present(host) <= read_possible(host)


def test_a_host_without_isolated_cpus(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/cpu/isolated")
    (fake.path / "sys/fs/cgroup/cpuset.cpus.isolated").unlink()
    assert read_isolated(fake) == CpuSet()


def test_amds_topology_extensions_are_those_of_cpuinfo(host: HostRoot) -> None:
    flags = (host.find("proc/cpuinfo") or "").partition("\nflags")[2].partition("\n")[0].split()
    assert read_topoext(host) == ("topoext" in flags)


@pytest.mark.parametrize(
    ("modalias", "has"),
    [
        ("cpu:type:x86,ven0002fam0019mod0001:feature:,0000,00D5,00D6,00D7,", True),
        ("cpu:type:x86,ven0000fam00D6mod00A7:feature:,0000,00D5,00D7,", False),
        ("", False),
    ],
)
def test_amds_topology_extensions(fake: FakeRoot, modalias: str, has: bool) -> None:
    fake.add("sys/devices/system/cpu/modalias", modalias)
    assert read_topoext(fake) is has


def test_a_cpu_without_topology_is_an_error_with_the_file(fake: FakeRoot) -> None:
    (fake.path / "sys/devices/system/cpu/cpu5/topology/core_cpus_list").unlink()
    fake.add("sys/devices/system/cpu/cpu4/topology/core_cpus_list", "4")
    with pytest.raises(HostError, match="cpu5/topology/core_cpus_list") as caught:
        all_read(survey_cores(fake))
    assert caught.value.errno == ENOENT


@pytest.fixture(params=["host", "kernel"])
def mover(request: pytest.FixtureRequest, host: HostRoot) -> Iterator[tuple[HostRoot, int]]:
    """A host with a thread that may be moved: the host under test, and always the kernel that runs the tests, too."""
    with subprocess.Popen(["sleep", "600"]) as process:
        if request.param == "kernel":
            host = HostRoot()
        if isinstance(host, FakeRoot):
            add_thread(host, process.pid)
        yield host, process.pid
        process.kill()


def add_thread(fake: FakeRoot, pid: int, flags: int = 0) -> None:
    """A process of one thread, as much of it as tells where it may run (fs/proc/array.c)."""
    folder = f"proc/{pid}/task/{pid}"
    fake.add(f"{folder}/stat", f"{pid} (sleep) S 1 1 1 0 -1 {flags} " + "0 " * 43)
    fake.add(f"{folder}/status", "Name:\tsleep\nCpus_allowed_list:\t0-7\nMems_allowed_list:\t0-1")


def test_a_thread_is_confined_to_a_cpu(mover: tuple[HostRoot, int]) -> None:
    host, tid = mover
    before = read_affinity(host, tid)
    one = CpuSet.of([min(before.ids)])
    set_affinity(host, tid, one)
    assert read_affinity(host, tid) == one
    set_affinity(host, tid, before)
    assert read_affinity(host, tid) == before


def test_an_affinity_shows_in_the_threads_status(mover: tuple[HostRoot, int]) -> None:
    host, tid = mover
    one = CpuSet.of([max(read_affinity(host, tid).ids)])
    set_affinity(host, tid, one)
    assert f"Cpus_allowed_list:\t{one}\n" in host.read(f"proc/{tid}/task/{tid}/status")


def test_cpus_that_the_kernel_left_out_are_an_error_with_both_sets(mover: tuple[HostRoot, int]) -> None:
    host, tid = mover
    one = min(read_affinity(host, tid).ids)
    with pytest.raises(HostError, match=rf"requested CPUs {one},{NO_SUCH_CPU}, kernel set {one}\n") as caught:
        set_affinity(host, tid, CpuSet.of([one, NO_SUCH_CPU]))
    assert caught.value.errno == 0


def test_no_cpu_that_is_online_is_an_error(mover: tuple[HostRoot, int]) -> None:
    host, tid = mover
    with pytest.raises(HostError, match=str(NO_SUCH_CPU)) as caught:
        set_affinity(host, tid, CpuSet.of([NO_SUCH_CPU]))
    assert caught.value.errno == EINVAL


def test_a_thread_that_has_ended_is_an_error(mover: tuple[HostRoot, int]) -> None:
    host, _ = mover
    with subprocess.Popen(["true"]) as ended:
        pass
    for call in (lambda: read_affinity(host, ended.pid), lambda: set_affinity(host, ended.pid, CpuSet.of([0]))):
        with pytest.raises(HostError, match=str(ended.pid)) as caught:
            call()
        assert caught.value.errno == ESRCH


def test_a_thread_that_the_kernel_pins_cannot_be_moved(fake: FakeRoot) -> None:
    add_thread(fake, 17, flags=PF_NO_SETAFFINITY)
    with pytest.raises(HostError, match="PF_NO_SETAFFINITY") as caught:
        set_affinity(fake, 17, CpuSet.of([0]))
    assert caught.value.errno == EINVAL
    assert read_affinity(fake, 17) == CpuSet.parse("0-7")


def test_a_cpuset_bounds_where_a_thread_may_run(fake: FakeRoot) -> None:
    add_thread(fake, 17)
    fake.add("proc/17/task/17/cgroup", "0::/machine.slice")
    fake.add("sys/fs/cgroup/machine.slice/cpuset.cpus.effective", "2-5")
    with pytest.raises(HostError, match="requested CPUs 1-2, kernel set 2"):
        set_affinity(fake, 17, CpuSet.parse("1-2"))
    with pytest.raises(HostError, match="cpuset") as caught:
        set_affinity(fake, 17, CpuSet.parse("0-1"))
    assert caught.value.errno == EINVAL


def test_a_fake_host_outlives_its_process(fake: FakeRoot) -> None:
    add_thread(fake, 17)
    set_affinity(fake, 17, CpuSet.of([3]))
    assert read_affinity(FakeRoot(fake.path), 17) == CpuSet.of([3])


def test_a_per_cpu_kernel_thread_cannot_be_moved(real: HostRoot) -> None:
    tid = next(int(name) for name in real.names("proc") if name.isdecimal() and real.find(f"proc/{name}/comm") == "ksoftirqd/0")
    with pytest.raises(HostError, match="PF_NO_SETAFFINITY") as caught:
        set_affinity(real, tid, read_online(real))
    assert caught.value.errno == EINVAL
