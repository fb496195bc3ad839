"""What the checks of a server read: processors, memory, control groups; and an instruction run under KVM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.errors import HostError
from orchestrator.host.cgroups import read_controllers
from orchestrator.host.cpus import read_online
from orchestrator.host.kvm import run_instruction
from orchestrator.host.memory import read_hugetlb_mounts, read_swaps, read_transparent
from orchestrator.host.processor import (
    has_remapped_interrupts,
    read_clock_source,
    read_core_types,
    read_kvm_parameter,
    read_processors,
    read_smt_control,
    read_vulnerabilities,
)
from orchestrator.host.root import HostRoot
from tests.fakes.root import FakeRoot

# A lab of two CPUs, Linux 6.12.
CPUINFO = "\n\n".join(
    f"processor\t: {cpu}\nvendor_id\t: AuthenticAMD\nmodel name\t: QEMU\nmicrocode\t: 0x1\nflags\t\t: fpu svm npt\nbugs\t\t:"
    for cpu in range(8)
)
FILES = {
    "proc/cpuinfo": CPUINFO,
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority",
    "proc/mounts": "hugetlbfs /dev/hugepages hugetlbfs rw,nosuid,nodev,relatime,pagesize=2M 0 0",
    "proc/interrupts": "            CPU0       CPU1\n  24:          0          0  AMD-Vi-MSI    0-edge      AMD-Vi\n"
    "  25:          1          0 IR-PCI-MSIX-0000:10:00.0    0-edge      nic0",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc",
    "sys/devices/system/cpu/smt/control": "on",
    "sys/devices/system/cpu/vulnerabilities/meltdown": "Not affected",
    "sys/module/kvm_amd/parameters/npt": "Y",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc",
    "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
}


@pytest.fixture
def filled(host: HostRoot) -> HostRoot:
    if isinstance(host, FakeRoot):
        for name, text in FILES.items():
            host.add(name, text)
    return host


def test_each_online_cpu_is_read_with_its_features(filled: HostRoot) -> None:
    found = read_processors(filled)
    assert [processor.cpu for processor in found] == list(read_online(filled).ids)
    for processor in found:
        assert processor.vendor in ("AuthenticAMD", "GenuineIntel")
        assert processor.model
        assert {"svm", "vmx"} & processor.flags


def test_state_of_processors_is_read(filled: HostRoot) -> None:
    assert read_clock_source(filled)
    assert read_smt_control(filled) in ("on", "off", "forceoff", "notsupported", "notimplemented", None)
    assert read_kvm_parameter(filled, "npt") or read_kvm_parameter(filled, "ept")
    assert read_kvm_parameter(filled, "no_such_parameter") is None
    assert all(read_vulnerabilities(filled).values())
    assert read_core_types(filled) == ()


def test_interrupts_are_remapped(filled: HostRoot) -> None:
    assert has_remapped_interrupts(filled)


def test_interrupts_of_the_iommu_itself_are_not_taken_for_remapped_ones(fake: FakeRoot) -> None:
    fake.add(
        "proc/interrupts",
        "  24:  0  AMD-Vi-MSI  0-edge  AMD-Vi\n  25:  1  PCI-MSI  0-edge  IR-remote\n 26: 1 DMAR-MSI 0-edge dmar0",
    )
    assert not has_remapped_interrupts(fake)


@pytest.mark.parametrize("text", ["", "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd\n"])
def test_other_architecture_has_no_processors_with_flags(fake: FakeRoot, text: str) -> None:
    fake.add("proc/cpuinfo", text)
    assert read_processors(fake) == ()


def test_memory_settings_are_read(filled: HostRoot) -> None:
    assert read_swaps(filled) == ()
    assert read_hugetlb_mounts(filled)
    assert read_transparent(filled) in ("always", "madvise", "never", "")


def test_swap_areas_are_named(fake: FakeRoot) -> None:
    fake.add("proc/swaps", f"{FILES['proc/swaps']}\n/dev/sda2  partition 8388604 0 -2\n/swap\\040file file 1 0 -3")
    assert read_swaps(fake) == ("/dev/sda2", "/swap\\040file")


def test_controllers_of_version_2_are_read(filled: HostRoot) -> None:
    assert "cpuset" in (read_controllers(filled) or ())


def test_host_with_version_1_has_no_controllers_of_version_2(fake: FakeRoot) -> None:
    (fake.path / "sys/fs/cgroup/cgroup.controllers").unlink(missing_ok=True)
    assert read_controllers(fake) is None


def find_children() -> set[str]:
    """Of all threads, also those that have ended and were not waited for."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm")
def test_instruction_is_executed_and_leaves_no_process() -> None:
    before = find_children()
    run_instruction()
    with pytest.raises(HostError, match="did not execute two instructions within 0 s"):
        run_instruction(timeout=0)
    assert find_children() == before


def test_device_that_is_not_kvm_is_an_error(tmp_path: Path) -> None:
    for path, text in ((tmp_path / "missing", "missing: No such file"), (tmp_path / "file", "file: Inappropriate ioctl")):
        (tmp_path / "file").touch()
        with pytest.raises(HostError, match=text):
            run_instruction(path)
