"""How the kernel shows the confinement of a process: this machine's own kernel, and files for what it does not have."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from errno import EACCES, EINVAL, ESRCH
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host.confinement import read_confinement
from orchestrator.host.root import HostRoot
from tests.fakes.root import FakeRoot, build_host

KERNEL = HostRoot()
PID = 4944
# Of a QEMU that libvirt started (kernel 6.12), cut to what is read.
STATUS = """Name:\tqemu-system-x86
Uid:\t64055\t64055\t64055\t64055
Gid:\t64055\t64055\t64055\t64055
Groups:\t993 64055
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t000001ffffffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t1"""

needs_first_process = pytest.mark.skipif(
    not os.access("/proc/1/ns/mnt", os.R_OK), reason="needs root outside a container: the namespaces of process 1"
)


@pytest.fixture
def fake(tmp_path: Path) -> FakeRoot:
    fake = build_host(tmp_path, f"proc/{PID}/attr/current = libvirt-1 (enforce)")
    fake.add(f"proc/{PID}/task/{PID}/status", STATUS)
    fake.add(f"proc/{PID}/task/4955/status", STATUS.replace("CapAmb:\t0000000000000000", "CapAmb:\t0000000000000400"))
    for pid, number in ((1, 1), (PID, 2)):
        fake.add_link(f"proc/{pid}/ns/mnt", f"mnt:[{number}]")
        fake.add_link(f"proc/{pid}/ns/net", "net:[3]")
        fake.add_link(f"proc/{pid}/ns/pid_for_children", f"pid:[{number}]")
    return fake


def test_threads_label_and_namespaces(fake: FakeRoot) -> None:
    found = read_confinement(fake, PID)
    assert [(thread.tid, thread.seccomp, thread.capabilities) for thread in found.threads] == [(PID, 2, 0), (4955, 2, 1 << 10)]
    assert found.threads[0].gids == {993, 64055}
    assert (found.label, found.selinux_enforcing) == ("libvirt-1 (enforce)", None)
    assert found.namespaces == {"mnt": True, "net": False}


@pytest.mark.parametrize(("text", "enforcing"), [("1", True), ("0", False)])
def test_selinux_label_ends_with_nul(fake: FakeRoot, text: str, enforcing: bool) -> None:
    fake.add("sys/fs/selinux/enforce", text)
    fake.add(f"proc/{PID}/attr/current", "system_u:system_r:svirt_t:s0:c1,c2\0")
    found = read_confinement(fake, PID)
    assert (found.label, found.selinux_enforcing) == ("system_u:system_r:svirt_t:s0:c1,c2", enforcing)


def test_kernel_without_labels(fake: FakeRoot) -> None:
    fake.read_errors[f"proc/{PID}/attr/current"] = EINVAL
    assert read_confinement(fake, PID).label is None
    fake.read_errors.clear()
    (fake.path / f"proc/{PID}/attr/current").unlink()
    assert read_confinement(fake, PID).label is None


def test_thread_that_ends_meanwhile_is_left_out(fake: FakeRoot) -> None:
    fake.read_errors[f"proc/{PID}/task/4955/status"] = ESRCH
    assert [thread.tid for thread in read_confinement(fake, PID).threads] == [PID]


@pytest.mark.parametrize("name", [f"proc/{PID}/task/4955/status", f"proc/{PID}/attr/current"])
def test_file_that_cannot_be_read_is_an_error(fake: FakeRoot, name: str) -> None:
    fake.read_errors[name] = EACCES
    with pytest.raises(HostError, match=name):
        read_confinement(fake, PID)


@pytest.mark.parametrize("line", ["Uid", "Gid", "Groups", "CapEff", "CapAmb", "NoNewPrivs", "Seccomp"])
def test_status_without_a_field_is_an_error(fake: FakeRoot, line: str) -> None:
    kept = "\n".join(text for text in STATUS.splitlines() if not text.startswith(f"{line}:"))
    fake.add(f"proc/{PID}/task/{PID}/status", kept)
    with pytest.raises(HostError, match=f"cannot parse the status of thread {PID}"):
        read_confinement(fake, PID)


def test_process_that_ended_is_an_error(fake: FakeRoot) -> None:
    with pytest.raises(HostError):
        read_confinement(fake, 77)


@needs_first_process
def test_this_process_on_the_real_kernel() -> None:
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    try:
        found = read_confinement(KERNEL, os.getpid())
    finally:
        waiting.set()
        thread.join()
    assert {os.getpid(), thread.native_id} <= {one.tid for one in found.threads}
    (main,) = (one for one in found.threads if one.tid == os.getpid())
    assert os.geteuid() in main.uids
    assert set(os.getgroups()) <= main.gids
    assert {"mnt", "net", "pid", "user"} <= found.namespaces.keys()


@needs_first_process
def test_filter_and_privileges_of_a_child_on_the_real_kernel() -> None:
    """A child that sets no_new_privs and a filter that permits all calls (prctl(2), seccomp(2))."""
    program = (
        "import ctypes, sys; libc = ctypes.CDLL(None); libc.prctl(38, 1, 0, 0, 0)\n"
        "allow = (ctypes.c_uint8 * 8)(6, 0, 0, 0, 0, 0, 0xff, 0x7f)\n"
        "class Prog(ctypes.Structure): _fields_ = [('n', ctypes.c_ushort), ('p', ctypes.c_void_p)]\n"
        "prog = Prog(1, ctypes.addressof(allow)); print(libc.prctl(22, 2, ctypes.byref(prog)), flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout
    try:
        assert child.stdout.readline() == b"0\n"
        (thread,) = read_confinement(KERNEL, child.pid).threads
        assert (thread.no_new_privileges, thread.seccomp) == (True, 2)
    finally:
        child.communicate(b"")
