"""Moving one thread into a threaded control group, which is how QEMU's helper threads leave a guest's core."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENOENT, EOPNOTSUPP, ESRCH
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cgroups import move_thread, read_cgroup
from orchestrator.host.root import HostRoot
from tests.fakes.root import FakeRoot

GROUPS = Path("sys/fs/cgroup")
NAME = r"nohype-contract\x2d1"  # systemd escapes like this; the backslash must survive


@dataclass(frozen=True)
class Playground:
    """A process in a group NAME with threaded children `emulator` and `vcpu0`, and a group `elsewhere` that is not threaded."""

    pid: int


@pytest.fixture
def playground(host: HostRoot) -> Iterator[Playground]:
    folders = [f"{NAME}", f"{NAME}/emulator", f"{NAME}/vcpu0", f"{NAME}-elsewhere"]
    process = subprocess.Popen(["sleep", "60"])
    if isinstance(host, FakeRoot):
        for folder in folders:
            host.add(f"{GROUPS}/{folder}/cgroup.threads")
            host.add(f"{GROUPS}/{folder}/cgroup.type", "threaded" if "/" in folder else "domain")
        for name in (f"proc/{process.pid}/cgroup", f"proc/{process.pid}/task/{process.pid}/cgroup"):
            host.add(name, f"0::/{NAME}")
    else:
        for folder in folders:
            os.mkdir(host.path / GROUPS / folder)
        for child in folders[1:3]:
            host.write(f"{GROUPS}/{child}/cgroup.type", "threaded")
        host.write(f"{GROUPS}/{NAME}/cgroup.procs", str(process.pid))
    yield Playground(process.pid)
    process.kill()
    process.wait()
    if not isinstance(host, FakeRoot):
        for folder in (*folders[1:], folders[0]):
            os.rmdir(host.path / GROUPS / folder)


def test_a_thread_moves_and_comes_back(host: HostRoot, playground: Playground) -> None:
    pid = playground.pid
    for group in (f"/{NAME}/emulator", f"/{NAME}/vcpu0"):
        move_thread(host, pid, group)
        assert read_cgroup(host, pid, pid) == group


def test_the_slash_in_front_may_be_missing(host: HostRoot, playground: Playground) -> None:
    move_thread(host, playground.pid, f"{NAME}/vcpu0/")
    assert read_cgroup(host, playground.pid, playground.pid) == f"/{NAME}/vcpu0"


def test_no_such_group(host: HostRoot, playground: Playground) -> None:
    before = read_cgroup(host, playground.pid, playground.pid)
    with pytest.raises(HostError, match=r"to control group /nohype-nowhere.*\n.*the control group does not exist") as caught:
        move_thread(host, playground.pid, "/nohype-nowhere")
    assert caught.value.errno == ENOENT
    assert read_cgroup(host, playground.pid, playground.pid) == before


def test_a_group_outside_of_the_threaded_subtree(host: HostRoot, playground: Playground) -> None:
    with pytest.raises(HostError, match="same domain group") as caught:
        move_thread(host, playground.pid, f"/{NAME}-elsewhere")
    assert caught.value.errno == EOPNOTSUPP


def test_a_thread_that_has_ended(host: HostRoot, playground: Playground) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(HostError, match=str(ended.pid)) as caught:
        move_thread(host, ended.pid, f"/{NAME}/vcpu0")
    assert caught.value.errno == ESRCH
    with pytest.raises(HostError, match=f"proc/{ended.pid}") as caught:
        read_cgroup(host, ended.pid, ended.pid)
    assert caught.value.errno == ENOENT


def test_a_thread_that_does_not_stay_is_an_error_with_both_groups(fake: FakeRoot, playground: Playground) -> None:
    class Stubborn(FakeRoot):
        def write(self, name: str, value: str) -> None:
            """Takes the write, and does nothing."""

    with pytest.raises(HostError, match=r"requested control group .*/vcpu0, but it is in /nohype"):
        move_thread(Stubborn(fake.path), playground.pid, f"/{NAME}/vcpu0")


def test_a_host_with_version_1_only(fake: FakeRoot) -> None:
    fake.add("proc/7/task/7/cgroup", "4:cpuset:/a\n1:name=systemd:/b")
    with pytest.raises(HostError, match="not in a control group of version 2"):
        read_cgroup(fake, 7, 7)
