"""The host under test: a fake one made of files, or, with NOHYPE_CONTRACT_ROOT=/ NOHYPE_CONTRACT_PF=ADDRESS, the real one.

On a real host the tests make changes and undo them; no guest may run meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from orchestrator.host import netlink
from orchestrator.host.edge import read_edge_mode, set_edge_mode
from orchestrator.host.exit_trace import begin_counting, end_counting
from orchestrator.host.pci import bind_driver, release_driver
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_pfs, set_numvfs
from orchestrator.model.topology import PhysicalFunction, VfState
from orchestrator.values import PciAddress
from tests.fakes.root import FakeRoot, load_host
from tests.harness.edge_network import build_network

REAL = os.environ.get("NOHYPE_CONTRACT_ROOT")
Holder = Callable[[PciAddress], AbstractContextManager[None]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a real host, tests that need the fake one are not set up: skipping them takes long under emulation."""
    if REAL:
        fake_only = [item for item in items if "fake" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=fake_only)
        items[:] = [item for item in items if item not in set(fake_only)]


@pytest.fixture
def host(tmp_path: Path) -> HostRoot:
    """The fake host `numa`, or the real one."""
    return HostRoot(Path(REAL), netlink) if REAL else load_host(tmp_path / "host", "numa")


@pytest.fixture
def fake(host: HostRoot) -> FakeRoot:
    """For what must not, or cannot, be provoked on a real host."""
    if not isinstance(host, FakeRoot):
        pytest.skip("only on the fake host: it would harm a real one, or cannot be provoked there")
    return host


@pytest.fixture
def traced(host: HostRoot) -> Iterator[HostRoot]:
    """A host with the manager's trace instance, which counts VM exits only."""
    if not host.exists("sys/kernel/tracing/events/kvm/kvm_exit"):
        pytest.skip("the module kvm is not loaded, or tracefs is not mounted")
    begin_counting(host)
    yield host
    end_counting(host)


@pytest.fixture
def real(host: HostRoot) -> HostRoot:
    """For what only hardware shows."""
    if isinstance(host, FakeRoot):
        pytest.skip("only on a real host: NOHYPE_CONTRACT_ROOT=/ NOHYPE_CONTRACT_PF=ADDRESS")
    return host


def find_pf(host: HostRoot) -> PhysicalFunction:
    """The PF to play with: the only one of the fake host, the named one of a real host."""
    wanted = os.environ.get("NOHYPE_CONTRACT_PF")
    found = [pf for pf in read_pfs(host) if wanted in (None, str(pf.address))]
    assert found, f"the host has no PF {wanted}"
    return found[0]


@pytest.fixture(scope="session")
def _real_pf_put_back() -> Iterator[None]:
    """What the tests did to the real PF is undone once, at the end: making VFs takes an emulated NIC seconds."""
    if not REAL:
        yield
        return
    host = HostRoot(Path(REAL), netlink)
    before = find_pf(host)
    busy = [str(vf.address) for vf in before.vfs if vf.driver == "vfio-pci" and read_enable(host, vf.address) != "0"]
    if busy:
        pytest.fail(f"stop the guests that have {', '.join(busy)} first: these tests make and destroy VFs")
    mode = read_edge_mode(host, before)
    states = host.net.read_vfs(before.interface or "")
    yield
    release_vfs(host, before)
    if len(find_pf(host).vfs) != len(before.vfs):
        set_numvfs(host, before.address, len(before.vfs))
    for vf in before.vfs:
        if vf.driver:
            bind_driver(host, vf.address, vf.driver)
    for state in states:
        host.net.enforce_vf(before.interface or "", state)
    if mode:
        set_edge_mode(host, before, mode)


@pytest.fixture
def pf(host: HostRoot, _real_pf_put_back: None) -> Iterator[PhysicalFunction]:
    """A PF to play with, up. Each test finds its VFs without drivers, and however many the one before left."""
    await_link(host)
    found = find_pf(host)
    yield found
    if REAL:
        release_vfs(host, found)


def await_link(host: HostRoot) -> None:
    """A real PF is reset, and loses its link for a moment, when VFs are made or removed; igb then refuses rates (EINVAL)."""
    deadline = time.monotonic() + 60
    while not find_pf(host).up and time.monotonic() < deadline:
        time.sleep(0.1)


def make_two_vfs(host: HostRoot, pf: PhysicalFunction) -> None:
    """Two VFs with the settings of new ones. On a real host VFs that exist are only set back, as their creation takes 5 s."""
    now, new = find_pf(host), (VfState(0), VfState(1))
    if not isinstance(host, FakeRoot) and len(now.vfs) == len(new) and pf.interface:
        for state in new:
            host.net.enforce_vf(pf.interface, state)
        if host.net.read_vfs(pf.interface) == new:
            return
    set_numvfs(host, pf.address, 0)
    set_numvfs(host, pf.address, len(new))
    await_link(host)


def read_enable(host: HostRoot, address: PciAddress) -> str:
    """What vfio-pci sets to 1 while a guest has the function."""
    return host.read(f"sys/bus/pci/devices/{address}/enable")


def release_vfs(host: HostRoot, pf: PhysicalFunction) -> None:
    """Takes the drivers off the PF's VFs."""
    for vf in next(now.vfs for now in read_pfs(host) if now.address == pf.address):
        release_driver(host, vf.address, None)


@pytest.fixture
def vf_driver(host: HostRoot) -> Iterator[str]:
    """The name of the driver that the PF's VFs have by their id, loaded."""
    name, loaded = "igbvf", host.exists("sys/bus/pci/drivers/igbvf")
    if isinstance(host, FakeRoot):
        host.add(f"sys/bus/pci/drivers/{name}/bind")
        host.add(f"sys/bus/pci/drivers/{name}/unbind")
    elif not loaded:
        # The host role keeps VF drivers away with an `install` line.
        subprocess.run(["modprobe", "--ignore-install", name], check=True)
    yield name
    if not isinstance(host, FakeRoot) and not loaded:
        subprocess.run(["modprobe", "-r", name], check=True)


@pytest.fixture
def hold(host: HostRoot) -> Holder:
    """Opens a function through vfio-pci, as a guest does, for the time of a `with`."""

    @contextmanager
    def hold_fake(address: PciAddress) -> Iterator[None]:
        assert isinstance(host, FakeRoot)
        host.add(f"sys/bus/pci/devices/{address}/enable", "1")
        yield
        host.add(f"sys/bus/pci/devices/{address}/enable", "0")

    return hold_fake if isinstance(host, FakeRoot) else _hold_real


@contextmanager
def _hold_real(address: PciAddress) -> Iterator[None]:
    """The least that VFIO wants: container, group, IOMMU type 1, device (Documentation/driver-api/vfio.rst)."""
    group_number = os.path.basename(os.readlink(f"/sys/bus/pci/devices/{address}/iommu_group"))
    set_container, get_device, set_iommu = 0x3B68, 0x3B6A, 0x3B66  # include/uapi/linux/vfio.h: _IO(';', 100 + n)
    descriptors = [os.open("/dev/vfio/vfio", os.O_RDWR), os.open(f"/dev/vfio/{group_number}", os.O_RDWR)]
    container, group = descriptors
    try:
        fcntl.ioctl(group, set_container, bytearray(struct.pack("i", container)))
        fcntl.ioctl(container, set_iommu, 1)
        # With a mutable buffer ioctl() gives the call's own result, which here is a descriptor.
        descriptors.append(fcntl.ioctl(group, get_device, bytearray(f"{address}\0".encode())))
        yield
    finally:
        for descriptor in reversed(descriptors):
            os.close(descriptor)


@pytest.fixture
def network() -> Iterator[None]:
    """The network namespaces of an edge, without guests."""
    if os.geteuid():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("network namespaces need root")
    with build_network():
        yield
