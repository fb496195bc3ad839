"""How long vCPUs have run, as the kernel counts it for their threads."""

from __future__ import annotations

import pytest

from orchestrator.errors import HostError
from orchestrator.guests.service import GuestService
from orchestrator.guests.vcpu_times import VcpuTimes
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from tests.harness.crash import World
from tests.harness.guests import create


@pytest.fixture
def times(world: World, manager: GuestService, ledger: Ledger) -> VcpuTimes:
    create(manager, name="web")
    create(manager, name="db")
    return VcpuTimes(world.host, world.hypervisor, ledger)


def show_times(world: World, name: str, text: str) -> None:
    guest = world.hypervisor.read_guest(name)
    for vcpu in guest.vcpus:
        world.host.add(f"proc/{guest.pid}/task/{vcpu.tid}/schedstat", text)


def test_each_vcpu_of_running_guests_has_its_times(world: World, manager: GuestService, times: VcpuTimes) -> None:
    show_times(world, "web", "3000000000 500000000 7")
    show_times(world, "db", "1000000 0 1")
    assert list(times.read()) == [("db", 0, 0.001, 0.0), ("db", 1, 0.001, 0.0), ("web", 0, 3.0, 0.5), ("web", 1, 3.0, 0.5)]
    manager.kill(OPERATOR, "db", None)
    assert {one.guest for one in times.read()} == {"web"}


def test_restarted_guest_has_the_times_of_its_new_threads(world: World, manager: GuestService, times: VcpuTimes) -> None:
    show_times(world, "web", "3000000000 0 7")
    show_times(world, "db", "3000000000 0 7")
    assert {one.ran for one in times.read()} == {3.0}
    manager.restart(OPERATOR, "web", 0)
    show_times(world, "web", "5000000 0 7")
    assert {(one.guest, one.ran) for one in times.read()} == {("web", 0.005), ("db", 3.0)}


def test_qemu_is_asked_once_per_run(world: World, times: VcpuTimes, monkeypatch: pytest.MonkeyPatch) -> None:
    show_times(world, "web", "1 1 1")
    show_times(world, "db", "1 1 1")
    list(times.read())
    monkeypatch.setattr(world.hypervisor, "read_guest", None)
    assert len(list(times.read())) == 4


def test_kernel_that_does_not_count_is_an_error(world: World, times: VcpuTimes) -> None:
    """CONFIG_SCHED_INFO: the file does not exist."""
    with pytest.raises(HostError, match="schedstat"):
        list(times.read())
