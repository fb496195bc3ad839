"""Threads and memory of processes: this machine's own kernel for what every kernel shows, files for what it does not have."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, ESRCH
from pathlib import Path
from uuid import UUID

import pytest

from orchestrator.errors import HostError
from orchestrator.host.processes import (
    Thread,
    read_boot_id,
    read_last_run,
    read_machine_owners,
    read_maps,
    read_open_files,
    read_pagemap,
    read_services,
    survey_threads,
)
from orchestrator.host.root import HostRoot
from orchestrator.host.thread_owner import ThreadOwner, find_owner
from orchestrator.values import CpuSet
from tests.contract.conftest import REAL
from tests.fakes.root import FakeRoot, all_read, build_host

KERNEL = HostRoot()
ME = os.getpid()

# A per-CPU kernel thread and a rescuer as kernel 6.12 shows them, and a vCPU; status is cut to what is read.
STAT = "{tid} ({name}) S 2 0 0 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 1 0 {started} 0 0 18446744073709551615 0 0 0 0 0 0 0 2147483647 0 0 0 0 17 {cpu} 0 0 0 0 0 0 0 0 0 0 0 0 0"  # noqa: E501


def add_thread(fake: FakeRoot, pid: int, tid: int, name: str, flags: int, allowed: str, cpu: int) -> None:
    folder = f"proc/{pid}/task/{tid}"
    fake.add(f"{folder}/stat", STAT.format(tid=tid, name=name, flags=flags, started=4200, cpu=cpu))
    fake.add(f"{folder}/status", f"Name:\t{name}\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed}")


@pytest.fixture
def fake(tmp_path: Path) -> FakeRoot:
    """A host with a per-CPU kernel thread, a rescuer and a QEMU of two threads."""
    fake = build_host(tmp_path, "proc/uptime = 100.0 700.0")
    add_thread(fake, 26, 26, "cpuhp/2", 69238848, "2", 2)
    add_thread(fake, 5, 5, "kworker/R-rcu_gp", 69238880, "0-7", 0)
    add_thread(fake, 2147, 2147, "qemu-system-x86", 138412416, "0-1", 1)
    add_thread(fake, 2147, 2158, "CPU 0/KVM", 138412224, "2", 2)
    return fake


def of(threads: tuple[Thread, ...], tid: int) -> Thread:
    return next(thread for thread in threads if thread.tid == tid)


@contextmanager
def parked_thread() -> Iterator[int]:
    """A thread of ours that waits; gives its id."""
    started, done, ids = threading.Event(), threading.Event(), []

    def wait() -> None:
        ids.append(threading.get_native_id())
        started.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    yield ids[0]
    done.set()
    thread.join()


def test_a_boot_has_a_name() -> None:
    assert str(UUID(read_boot_id(KERNEL))) == read_boot_id(KERNEL)


def test_kernel_threads_are_told_from_others(fake: FakeRoot) -> None:
    threads = all_read(survey_threads(fake))
    assert [thread.tid for thread in threads] == [5, 26, 2147, 2158]
    assert of(threads, 26) == Thread(26, 26, "cpuhp/2", CpuSet.parse("2"), 2, True, True, 42.0)
    assert of(threads, 5).pinned_by_kernel
    assert of(threads, 5).allowed == CpuSet.parse("0-7")
    assert of(threads, 2158) == Thread(2147, 2158, "CPU 0/KVM", CpuSet.parse("2"), 2, False, False, 42.0)


def test_thread_that_ends_while_it_is_read_is_left_out(fake: FakeRoot) -> None:
    fake.read_errors["proc/2147/task/2158/status"] = ESRCH
    assert [thread.tid for thread in all_read(survey_threads(fake))] == [5, 26, 2147]


def test_threads_that_are_forbidden_are_an_error_not_left_out(fake: FakeRoot) -> None:
    fake.read_errors["proc/2147/task/2158/status"] = EACCES
    with pytest.raises(HostError, match="proc/2147/task/2158/status"):
        all_read(survey_threads(fake))


def test_zombie_runs_nowhere(fake: FakeRoot) -> None:
    stat = fake.text("proc/2147/task/2147/stat")
    fake.add("proc/2147/task/2147/stat", stat.replace(") S ", ") Z "))
    assert 2147 not in [thread.tid for thread in all_read(survey_threads(fake))]


def test_own_threads_with_their_real_affinity() -> None:
    with parked_thread() as tid:
        cpu = min(os.sched_getaffinity(tid))
        os.sched_setaffinity(tid, {cpu})
        threads = all_read(survey_threads(KERNEL))
    assert (of(threads, tid).pid, of(threads, tid).allowed) == (ME, CpuSet.of((cpu,)))
    assert not of(threads, tid).kernel
    assert of(threads, ME).allowed == CpuSet.of(os.sched_getaffinity(ME))
    uptime = float(KERNEL.read("proc/uptime").split()[0])
    assert 0 < of(threads, ME).started < uptime
    assert all(thread.last_cpu >= 0 and len(thread.allowed) for thread in threads)


def test_the_real_kernels_own_threads() -> None:
    if KERNEL.find("proc/2/comm") != "kthreadd":
        pytest.skip("this process namespace does not show kernel threads")
    threads = all_read(survey_threads(KERNEL))
    bound = [thread for thread in threads if thread.name.startswith("migration/")]
    assert bound
    assert all(thread.kernel and thread.pinned_by_kernel and len(thread.allowed) == 1 for thread in bound)
    assert of(threads, 2).kernel
    assert not of(threads, 2).pinned_by_kernel


@pytest.mark.parametrize("name", ["a) R 1 (b", "two words", "("])
def test_names_with_brackets_and_blanks(name: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", f"open('/proc/self/comm','w').write({name!r}); print(); input()"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    found = of(all_read(survey_threads(KERNEL)), process.pid)
    process.communicate(b"\n")
    assert (found.name, found.pid) == (name, process.pid)
    assert found.allowed == CpuSet.of(os.sched_getaffinity(0))


def test_processes_that_come_and_go_do_no_harm() -> None:
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            subprocess.run(["/bin/true"], check=True)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3 if REAL else 30):  # a survey takes 2 s in the lab
            assert of(all_read(survey_threads(KERNEL)), ME).pid == ME
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_last_run_adds_what_the_tasks_clock_leaves_out(fake: FakeRoot) -> None:
    fake.add("proc/stat", "cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 0 0 0 0 0 100 100 100 0 0\ncpu2 0 0 0 0 0 10 20 30 0 0\nintr 5")
    fake.add("proc/26/task/26/sched", "cpuhp/2 (26, #threads: 1)\n---\nse.exec_start   :   30820.500000\nnr_switches : 11")
    thread = of(all_read(survey_threads(fake)), 26)
    assert read_last_run(fake, thread) == pytest.approx(30.8205 + 0.6)


@pytest.mark.parametrize("text", ["", "se.exec_start : 0.000000", "se.vruntime : 5.0"])
def test_last_run_that_the_kernel_does_not_tell(fake: FakeRoot, text: str) -> None:
    fake.add("proc/stat", "cpu2 0 0 0 0 0 10 20 30 0 0")
    fake.add("proc/26/task/26/sched", text)
    assert read_last_run(fake, of(all_read(survey_threads(fake)), 26)) is None


def test_last_run_without_scheduler_files(fake: FakeRoot) -> None:
    assert read_last_run(fake, of(all_read(survey_threads(fake)), 26)) is None


def test_last_run_of_a_real_thread() -> None:
    if not KERNEL.exists(f"proc/{ME}/sched"):
        pytest.skip("this kernel has no CONFIG_SCHED_DEBUG")
    # Both on one CPU: each CPU's time in interrupts is added, and differs by seconds.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with parked_thread() as tid:
            time.sleep(0.3)
            parked, mine = (read_last_run(KERNEL, of(all_read(survey_threads(KERNEL)), number)) for number in (tid, ME))
    finally:
        os.sched_setaffinity(0, before)
    if parked is None or mine is None:
        pytest.skip("the kernel moved a thread just now, so it does not tell")
    assert parked < mine


def test_services_by_their_cgroup(fake: FakeRoot) -> None:
    fake.add("proc/5/cgroup", "0::/")
    fake.add("proc/26/cgroup", "0::/system.slice/libvirtd.service")
    fake.add("proc/2147/cgroup", "0::/machine.slice/machine-qemu\\x2d3\\x2dg1.scope/libvirt/emulator")
    fake.add("proc/99/cgroup", "0::/system.slice/libvirtd.service/sub")
    found = read_services(fake, ("libvirtd.service", "nohyped.service", "virtd.service"))
    assert found == {"libvirtd.service": (26, 99), "nohyped.service": (), "virtd.service": ()}


@pytest.mark.skipif(os.geteuid() != 0, reason="locking memory and page frames need root")
class TestMemory:
    """What the kernel shows of a mapping that we made."""

    def test_locked_and_touched(self) -> None:
        size = 8 << 20
        area = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area[: size // 2] = b"x" * (size // 2)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        before = read_maps(KERNEL, ME)
        assert ctypes.CDLL(None).mlock(ctypes.c_void_p(start), ctypes.c_size_t(size)) == 0
        after = read_maps(KERNEL, ME)
        loose = next(mapping for mapping in before.mappings if mapping.start <= start < mapping.end)
        locked = next(mapping for mapping in after.mappings if mapping.start <= start < mapping.end)
        assert "lo" not in loose.flags
        assert "lo" in locked.flags
        assert after.locked - before.locked == size
        assert (locked.start, locked.end, locked.path, locked.huge) == (start, start + size, "", 0)
        assert locked.resident == size
        assert sum(count for _, count in locked.nodes) * mmap.PAGESIZE == size
        assert locked.policy

    def test_page_frames(self) -> None:
        area = mmap.mmap(-1, 4 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area[0] = area[2 * mmap.PAGESIZE] = 1
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        first, untouched, third = read_pagemap(KERNEL, ME, (start + 5, start + mmap.PAGESIZE, start + 2 * mmap.PAGESIZE))
        assert first is not None
        assert third is not None
        assert untouched is None
        assert first % mmap.PAGESIZE == 5
        assert third % mmap.PAGESIZE == 0
        assert first - 5 != third

    def test_file_mappings_have_their_path_and_offset(self) -> None:
        with tempfile.NamedTemporaryFile(suffix=" with blanks") as file:
            file.write(b"x" * 3 * mmap.PAGESIZE)
            file.flush()
            area = mmap.mmap(file.fileno(), mmap.PAGESIZE, offset=2 * mmap.PAGESIZE)
            found = next(mapping for mapping in read_maps(KERNEL, ME).mappings if mapping.path == file.name)
            assert (found.offset, found.end - found.start) == (2 * mmap.PAGESIZE, mmap.PAGESIZE)
            area.close()


def test_process_without_memory_is_an_error() -> None:
    with pytest.raises(HostError):
        read_maps(KERNEL, 2**22 + 1)


def test_open_files() -> None:
    with tempfile.NamedTemporaryFile() as file:
        assert file.name in read_open_files(KERNEL, ME)
    assert file.name not in read_open_files(KERNEL, ME)


def test_open_files_of_a_process_that_is_gone() -> None:
    with pytest.raises(HostError):
        read_open_files(KERNEL, 2**22 + 1)


@pytest.mark.skipif(not os.path.exists("/sys/kernel/debug/kvm"), reason="debugfs is not mounted, or the module kvm is not loaded")
def test_process_with_a_virtual_machine_is_found() -> None:
    """On a real host, which shows it in debugfs."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert ME not in read_machine_owners(KERNEL)
        machine = fcntl.ioctl(kvm, 0xAE01, 0)  # KVM_CREATE_VM
        assert ME in read_machine_owners(KERNEL)
        os.close(machine)
    finally:
        os.close(kvm)


def test_counters_of_all_machines_are_not_owners(fake: FakeRoot) -> None:
    for name in ("exits", "2147-14/exits", "2147-9/exits", "33-7/exits"):
        fake.add(f"sys/kernel/debug/kvm/{name}", "0")
    assert read_machine_owners(fake) == (33, 2147)


def test_thread_has_the_process_that_it_belongs_to() -> None:
    """This machine's own kernel."""
    found: list[ThreadOwner | None] = []
    thread = threading.Thread(target=lambda: found.append(find_owner(KERNEL, threading.get_native_id())))
    thread.start()
    thread.join()
    assert [owner and owner.pid for owner in found] == [ME]
    assert find_owner(KERNEL, 2**22 + 1) is None  # above every id (PID_MAX_LIMIT)


@pytest.mark.parametrize(
    ("group", "unit"),
    [
        ("/", ""),
        ("/system.slice/backup.service", "backup.service"),
        ("/user.slice/user-0.slice/user@0.service/app.slice/vm.service", "vm.service"),
        ("/machine.slice/machine-qemu.scope/libvirt/vcpu0", "machine-qemu.scope"),
        ("/lxc/web", "lxc/web"),
    ],
)
def test_thread_has_the_innermost_unit(fake: FakeRoot, group: str, unit: str) -> None:
    fake.add("proc/2158/status", "Name:\tCPU 0/KVM\nTgid:\t2147\n")
    fake.add("proc/2158/task/2158/cgroup", f"0::{group}")
    assert find_owner(fake, 2158) == ThreadOwner(2147, unit)
