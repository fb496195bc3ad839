"""What ran on a CPU: interrupts, softirqs and time slices, as the kernel counts them."""

from __future__ import annotations

import os
import subprocess
from errno import EACCES

import pytest

from orchestrator.errors import HostError
from orchestrator.host.activity import parse_interrupts, parse_softirqs, read_activity, read_thread_slices, read_thread_times
from orchestrator.host.cpus import read_online
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet
from tests.fakes.root import FakeRoot

INTERRUPTS = """           CPU0       CPU1       CPU3
  8:          0          4          2  IR-IO-APIC    8-edge      rtc0
 24:         10          0         30  IR-PCI-MSIX-0000:41:00.0    0-edge      nic0-TxRx-0
NMI:          0          0          0   Non-maskable interrupts
LOC:        100        200        300   Local timer interrupts
ERR:          7
"""
SOFTIRQS = """                    CPU0       CPU1       CPU2       CPU3
          HI:          1          0          0          2
       TIMER:         10         20         30         40
"""
SCHEDSTAT = """version 16
timestamp 4294900000
cpu0 0 0 10 2 3 4 500 600 70
domain0 SMT ff 1 2 3
cpu1 0 0 10 2 3 4 500 600 80
cpu3 0 0 10 2 3 4 500 600 90
"""


@pytest.fixture
def counted(host: HostRoot) -> HostRoot:
    """A host with counters of activity."""
    if isinstance(host, FakeRoot):
        host.add("proc/interrupts", INTERRUPTS)
        host.add("proc/softirqs", SOFTIRQS)
        host.add("proc/schedstat", SCHEDSTAT)
    return host


def test_counters_of_two_cpus_are_the_sums_of_each(counted: HostRoot) -> None:
    cpus = [0, 1]
    each = [read_activity(counted, CpuSet.of([cpu])) for cpu in cpus]
    both = read_activity(counted, CpuSet.of(cpus))
    # The counters of a running host grow from one reading to the next.
    for kind in ("interrupts", "softirqs"):
        for name, count in getattr(both, kind).items():
            assert count >= sum(getattr(one, kind).get(name, 0) for one in each), name
    assert both.interrupts["LOC"] > 0
    assert both.softirqs["TIMER"] > 0
    assert "imer" in both.names["LOC"]


def test_lines_for_the_whole_host_are_left_out(counted: HostRoot) -> None:
    if "ERR:" in counted.read("proc/interrupts"):
        assert "ERR" not in read_activity(counted, CpuSet.of([0])).interrupts


def test_cpu_that_is_not_online_is_an_error(counted: HostRoot) -> None:
    absent = max(read_online(counted)) + 1
    with pytest.raises(HostError, match=f"CPUs {absent}.*\n.*online"):
        read_activity(counted, CpuSet.of([0, absent]))


def test_columns_are_those_of_the_cpus() -> None:
    """CPU 2 is offline: it has no column in one file, and a column in the other."""
    cpus = CpuSet.parse("1,3")
    counts, names = parse_interrupts(INTERRUPTS, cpus)
    assert counts == {"8": 6, "24": 30, "NMI": 0, "LOC": 500}
    assert names["24"] == "IR-PCI-MSIX-0000:41:00.0 0-edge nic0-TxRx-0"
    assert parse_softirqs(SOFTIRQS, cpus) == {"HI": 2, "TIMER": 60}


def test_time_slices_are_the_last_number(fake: FakeRoot, counted: HostRoot) -> None:
    assert read_activity(counted, CpuSet.parse("1,3")).slices == 170
    os.unlink(fake.path / "proc/schedstat")
    assert read_activity(counted, CpuSet.parse("1,3")).slices is None, "a kernel without CONFIG_SCHEDSTATS"


@pytest.mark.parametrize("text", ["", "CPU0 CPU1\n 8: x y", "nothing"])
def test_text_of_another_format_is_an_error(text: str) -> None:
    with pytest.raises(HostError, match="proc/interrupts"):
        parse_interrupts(text, CpuSet.of([0]))


def test_softirqs_with_fewer_numbers_are_an_error() -> None:
    with pytest.raises(HostError, match="proc/softirqs"):
        parse_softirqs("CPU0 CPU1\nHI: 1\n", CpuSet.of([1]))


def test_slices_of_a_thread_grow_when_it_runs(host: HostRoot) -> None:
    pid = os.getpid()
    if isinstance(host, FakeRoot):
        host.add(f"proc/{pid}/task/{pid}/schedstat", "1000 20 5")
    first = read_thread_slices(host, [(pid, pid)])[pid]
    subprocess.run(["true"], check=True)  # waits, so that it runs again
    if isinstance(host, FakeRoot):
        host.add(f"proc/{pid}/task/{pid}/schedstat", "1000 20 6")
    assert read_thread_slices(host, [(pid, pid)])[pid] > first


def test_times_of_a_thread_grow_when_it_runs(host: HostRoot) -> None:
    pid = os.getpid()
    if isinstance(host, FakeRoot):
        host.add(f"proc/{pid}/task/{pid}/schedstat", "1000000000 20 5")
    first = read_thread_times(host, [(pid, pid)])[pid]
    subprocess.run(["true"], check=True)
    sum(range(100_000))
    if isinstance(host, FakeRoot):
        host.add(f"proc/{pid}/task/{pid}/schedstat", "1500000000 20 6")
    second = read_thread_times(host, [(pid, pid)])[pid]
    assert 0 < second.ran - first.ran < 60  # seconds
    assert second.waited >= first.waited


def test_thread_that_has_ended_is_left_out(host: HostRoot) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    assert read_thread_slices(host, [(ended.pid, ended.pid)]) == read_thread_times(host, [(ended.pid, ended.pid)]) == {}


def test_kernel_that_does_not_count_slices_is_an_error(fake: FakeRoot) -> None:
    (fake.path / "proc/77/task/77").mkdir(parents=True)
    with pytest.raises(HostError, match="proc/77/task/77/schedstat"):
        read_thread_slices(fake, [(77, 77)])
    fake.add("proc/77/task/77/schedstat", "1 2 3")
    fake.read_errors["proc/77/task/77/schedstat"] = EACCES
    with pytest.raises(HostError) as caught:
        read_thread_slices(fake, [(77, 77)])
    assert caught.value.errno == EACCES
