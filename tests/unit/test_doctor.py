"""The checks of `nohype doctor`: each passes on a fit server, and is broken on purpose."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli.main import nohype
from orchestrator.doctor.bundle import build_bundle
from orchestrator.doctor.catalogue import CHECKS
from orchestrator.doctor.check import Principle, Result, run_checks
from orchestrator.doctor.facts import Facts
from orchestrator.doctor.report import build_json, build_lines, find_status
from orchestrator.errors import CommandError, HostError
from orchestrator.host.run import Completed
from orchestrator.host.sriov import set_numvfs
from orchestrator.host.tuned import Tuned
from orchestrator.model.proof import Verdict
from orchestrator.values import CpuSet, PciAddress
from tests.fakes import resctrl
from tests.fakes.domains import add_thread
from tests.fakes.nvme import FakeNvme, add_nvme
from tests.fakes.root import FakeRoot, load_host

DOCS = Path(__file__).parents[2] / "docs" / "doctor.md"
CPU = """processor\t: {cpu}
vendor_id\t: AuthenticAMD
model name\t: EPYC
microcode\t: {microcode}
flags\t\t: fpu svm npt {more}
"""
LINES = {
    "proc/cmdline": "BOOT_IMAGE=/vmlinuz isolcpus=nohz,domain,managed_irq,2-7 nohz_full=2-7 rcu_nocbs=2-7",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority",
    "proc/mounts": "hugetlbfs /dev/hugepages hugetlbfs rw,pagesize=2M 0 0\n",
    "proc/interrupts": "           CPU0\n 24:  1  IR-PCI-MSIX-0000:10:00.0   0-edge  nic0-TxRx-0",
    "proc/sys/kernel/osrelease": "6.12.48-amd64",
    "proc/sys/kernel/nmi_watchdog": "0",
    "proc/sys/kernel/timer_migration": "1",
    "proc/sys/kernel/numa_balancing": "0",
    "proc/sys/vm/stat_interval": "120",
    "sys/devices/system/cpu/isolated": "2-7",
    "sys/devices/system/cpu/nohz_full": "2-7",
    "sys/devices/system/cpu/present": "0-7",
    "sys/devices/system/cpu/smt/control": "on",
    "sys/devices/system/cpu/vulnerabilities/meltdown": "Not affected",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc",
    "sys/module/kvm_amd/parameters/npt": "Y",
    "sys/module/kvm_amd/parameters/avic": "Y",
    "sys/module/kvm/parameters/nx_huge_pages": "never",
    "sys/module/kvm/parameters/halt_poll_ns": "0",
    "sys/module/kvm/parameters/min_timer_period_us": "1000",
    "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts": "N",
    "sys/class/iommu/ivhd0/amd-iommu/features": "f77ef22294ada:0",
    "sys/devices/system/cpu/cpufreq/policy2/scaling_governor": "performance",
    "sys/devices/system/cpu/cpufreq/policy2/affected_cpus": "2 3 4 5 6 7",
    **{
        f"sys/devices/system/cpu/cpu{cpu}/cpuidle/state0/{name}": text
        for cpu in range(8)
        for name, text in (("name", "C1"), ("latency", "1"), ("disable", "0"))
    },
    "sys/devices/system/edac/mc/mc0/ce_count": "3",
    "sys/devices/system/edac/mc/mc0/ue_count": "0",
    "sys/devices/system/node/has_memory": "0-1",
    "sys/module/kvm_amd/parameters/nested": "0",
    "sys/module/kvm_amd/parameters/pause_filter_count": "0",
    "sys/module/kvm/parameters/kvmclock_periodic_sync": "N",
    "run/systemd/netif/links/2": "ADMIN_STATE=unmanaged",
    "sys/kernel/mm/ksm/run": "0",
    "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
    "sys/kernel/security/lsm": "lockdown,capability,apparmor",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids",
    "proc/1/task/1/status": "Name:\tsystemd\nCpus_allowed_list:\t0-1",
}
VIRSH = "Compiled against library: libvirt 11.3.0\nUsing library: libvirt 11.3.0\nRunning hypervisor: QEMU 10.0.2\n"


def execute(words: Sequence[str]) -> Completed:
    return Completed(0, VIRSH if words[-1] == "version" else "", "")


def show_cpus(
    fake: FakeRoot, more: Callable[[int], str] = lambda _: "", microcode: Callable[[int], str] = lambda _: "0x1"
) -> None:
    fake.add("proc/cpuinfo", "\n".join(CPU.format(cpu=cpu, more=more(cpu), microcode=microcode(cpu)) for cpu in range(8)))


@pytest.fixture
def fake(tmp_path: Path) -> FakeRoot:
    found = load_host(tmp_path / "host", "numa")
    (found.path / "var/lib").mkdir(parents=True)
    for name, text in LINES.items():
        found.add(name, text)
    resctrl.mount(found, (0, 1))
    show_cpus(found)
    add_thread(found, 2, 2, "kthreadd", "0-7", flags=0x200000)
    add_nvme(found, "0000:50:00.0", FakeNvme("disk0", 1 << 20))
    set_numvfs(found, Facts(found).topology.pfs[0].address, 2)
    for index, name in enumerate(("nic0", "nic1"), 2):
        found.add(f"sys/class/net/{name}/ifindex", str(index))
    return found


def examine(fake: FakeRoot, own: str = "0-1", **changed: object) -> dict[str, Result]:
    settings = {"run_instruction": lambda: None, "execute": execute, **changed}
    facts = Facts(fake, CpuSet.parse(own), **settings)  # type: ignore[arg-type]
    return {result.check.name: result for result in run_checks(facts, CHECKS)}


def test_fit_server_passes(fake: FakeRoot) -> None:
    results = examine(fake)
    assert {name: result.finding for name, result in results.items() if result.finding.verdict is not Verdict.PASS} == {}
    assert find_status(list(results.values())) == 0
    assert list(build_lines(list(results.values())))[-1] == f"This server is ready for NoHype: {len(CHECKS)} checks."


def write(name: str, text: str) -> Callable[[FakeRoot], object]:
    return lambda fake: fake.add(name, text)


def remove(name: str) -> Callable[[FakeRoot], object]:
    return lambda fake: (fake.path / name).unlink()


def share_group(fake: FakeRoot) -> None:
    """The PF is in the group of its VF too."""
    pf = Facts(fake).topology.pfs[0]
    number, other = fake.link(f"sys/bus/pci/devices/{pf.vfs[0].address}/iommu_group"), pf.address
    fake.add_link(f"sys/kernel/iommu_groups/{number}/devices/{other}", f"../../../../bus/pci/devices/{other}")


def share_disk(fake: FakeRoot) -> None:
    number, other = fake.link("sys/bus/pci/devices/0000:50:00.0/iommu_group"), Facts(fake).topology.pfs[0].address
    fake.add_link(f"sys/kernel/iommu_groups/{number}/devices/{other}", f"../../../../bus/pci/devices/{other}")


def drive_without_iommu(fake: FakeRoot) -> None:
    for number in fake.names("sys/kernel/iommu_groups"):
        fake.add(f"sys/kernel/iommu_groups/{number}/name", "vfio-noiommu")


def forget_vfs(fake: FakeRoot) -> PciAddress:
    """As before the first VF is made."""
    pf = Facts(fake).topology.pfs[0].address
    set_numvfs(fake, pf, 0)
    return pf


def share_port(fake: FakeRoot) -> None:
    """The PF is in a group with its port, which has no ACS, and another card."""
    number = fake.link(f"sys/bus/pci/devices/{forget_vfs(fake)}/iommu_group")
    fake.add_link(f"sys/kernel/iommu_groups/{number}/devices/0000:50:00.0", "../../../../bus/pci/devices/0000:50:00.0")


def translate_nothing(fake: FakeRoot) -> None:
    number = fake.link(f"sys/bus/pci/devices/{forget_vfs(fake)}/iommu_group")
    fake.add(f"sys/kernel/iommu_groups/{number}/type", "identity")


def post_nothing(fake: FakeRoot) -> None:
    shutil.rmtree(fake.path / "sys/class/iommu")
    fake.add("sys/class/iommu/dmar0/intel-iommu/cap", "8d2078c106f0466")
    fake.add("sys/class/iommu/dmar1/intel-iommu/cap", "d2078c106f0466")


def make_large_pages(fake: FakeRoot) -> None:
    for name in ("nr", "free"):
        fake.add(f"sys/devices/system/node/node1/hugepages/hugepages-1048576kB/{name}_hugepages", "4")


def change_chip(fake: FakeRoot) -> None:
    """An I350 instead of an 82576: no rates."""
    fake.add(f"sys/bus/pci/devices/{Facts(fake).topology.pfs[0].address}/device", "0x1521")


def use_version_1(fake: FakeRoot) -> None:
    (fake.path / "sys/fs/cgroup/cgroup.controllers").unlink()
    fake.add("proc/mounts", f"{LINES['proc/mounts']}cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0")


def isolate(fake: FakeRoot, cpus: str) -> None:
    for name in ("sys/devices/system/cpu/isolated", "sys/fs/cgroup/cpuset.cpus.isolated"):
        fake.add(name, cpus)


BROKEN: list[tuple[str, Callable[[FakeRoot], object]]] = [
    ("virtualization", write("sys/module/kvm_amd/parameters/npt", "N")),
    ("smt-siblings", write("sys/devices/system/cpu/online", "0-6")),
    ("cpus-alike", lambda fake: show_cpus(fake, more=lambda cpu: "avx512f" if cpu == 5 else "")),
    ("cpus-alike", lambda fake: show_cpus(fake, microcode=lambda cpu: "0x2" if cpu else "0x1")),
    ("cpus-alike", lambda fake: [fake.add(f"sys/devices/cpu_{kind}/cpus", "0-3") for kind in ("core", "atom")]),
    ("cpus-alike", lambda fake: [fake.add(f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", f"{cpu // 6}") for cpu in range(8)]),
    ("isolation", lambda fake: isolate(fake, "2-6")),
    ("isolation", write("sys/devices/system/cpu/nohz_full", "(null)")),
    ("kernel-options", remove("sys/devices/system/cpu/nohz_full")),
    ("isolation", write("proc/1/task/1/status", "Name:\tsystemd\nCpus_allowed_list:\t0-7")),
    ("isolation", write("sys/module/kvm/parameters/halt_poll_ns", "200000")),
    ("clock-source", write("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet")),
    ("bare-metal", lambda fake: show_cpus(fake, more=lambda _: "hypervisor")),
    ("interrupt-exits", write("sys/module/kvm_amd/parameters/avic", "N")),
    ("device-interrupts", write("sys/class/iommu/ivhd0/amd-iommu/features", "29d3:0")),
    ("device-interrupts", write("proc/cmdline", f"{LINES['proc/cmdline']} intremap=on,nopost")),
    ("device-interrupts", post_nothing),
    ("kvm-parameters", write("sys/module/kvm_amd/parameters/pause_filter_count", "3000")),
    ("kvm-parameters", write("sys/module/kvm/parameters/kvmclock_periodic_sync", "Y")),
    ("nested-guests", write("sys/module/kvm_amd/parameters/nested", "1")),
    ("frequency", write("sys/devices/system/cpu/cpufreq/policy2/scaling_governor", "powersave")),
    ("idle-states", write("sys/devices/system/cpu/cpu2/cpuidle/state0/latency", "350")),
    ("cache-control", lambda fake: shutil.rmtree(fake.path / "sys/fs/resctrl")),
    ("numa-nodes", write("sys/devices/system/node/has_memory", "0")),
    ("numa-nodes", write("sys/devices/system/cpu/cpu6/topology/physical_package_id", "2")),
    ("memory-errors", write("sys/devices/system/edac/mc/mc0/ue_count", "1")),
    ("huge-page-mount", make_large_pages),
    ("vf-controls", change_chip),
    ("vulnerabilities", write("sys/devices/system/cpu/vulnerabilities/mds", "Mitigation: Clear CPU buffers; SMT vulnerable")),
    ("huge-pages", write("sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages", "0")),
    ("huge-page-mount", write("proc/mounts", "proc /proc proc rw 0 0")),
    ("swap", write("proc/swaps", "Filename\tType\n/swap.img file 2097148 0 -2")),
    ("page-merging", write("sys/kernel/mm/ksm/run", "1")),
    ("transparent-huge-pages", write("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never")),
    ("interrupt-remapping", write("proc/interrupts", " 24:  1  PCI-MSI 0-edge nic0")),
    ("interrupt-remapping", write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y")),
    ("iommu-overrides", write("proc/cmdline", f"{LINES['proc/cmdline']} pcie_acs_override=downstream")),
    ("iommu-groups", share_group),
    ("iommu-groups", share_port),
    ("iommu-groups", translate_nothing),
    ("disks", share_disk),
    ("kernel", write("proc/sys/kernel/osrelease", "5.15.0-generic")),
    ("cgroups", write("sys/fs/cgroup/cgroup.controllers", "hugetlb")),
    ("cgroups", use_version_1),
    ("qemu-confinement", write("sys/kernel/security/lsm", "lockdown,capability")),
    ("qemu-confinement", write("sys/kernel/security/lsm", "lockdown,capability,selinux")),
    ("uplink-owner", write("run/NetworkManager/devices/2", "[device]\nmanaged=true")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil"), BROKEN, ids=[f"{name}-{index}" for index, (name, _) in enumerate(BROKEN)])
def test_check_fails_on_a_server_without_the_property(fake: FakeRoot, name: str, spoil: Callable[[FakeRoot], object]) -> None:
    spoil(fake)
    results = examine(fake)
    finding = results[name].finding
    assert finding.verdict is Verdict.FAIL, finding
    assert finding.found
    assert finding.needed
    assert finding.remedy
    others = {other for other, result in results.items() if result.finding.verdict is Verdict.FAIL} - {name}
    assert others <= {"isolation"}, "a fault of one property must not look like one of another"
    assert find_status(list(results.values())) == (1 if results[name].check.required or others else 0)


def test_remedy_of_isolation_is_the_boot_parameters_of_this_server(fake: FakeRoot) -> None:
    isolate(fake, "")
    fake.add("sys/devices/system/cpu/nohz_full", "")
    fake.add("proc/cmdline", "quiet")
    remedy = examine(fake)["isolation"].finding.remedy
    assert "`isolcpus=nohz,domain,managed_irq,2-7 nohz_full=2-7 rcu_nocbs=2-7`" in remedy


def refuse(*_: object) -> None:
    raise HostError("a virtual CPU of /dev/kvm did not execute two instructions within 5 s")


def deny(*_: object) -> None:
    raise HostError("/dev/kvm: Permission denied")


def forbid(*_: object) -> None:
    """By the device policy of a container."""
    raise HostError("/dev/kvm: Operation not permitted")


@pytest.mark.parametrize(
    ("kvm", "verdict"), [(refuse, Verdict.FAIL), (deny, Verdict.NOT_MEASURED), (forbid, Verdict.NOT_MEASURED)]
)
def test_kvm_that_does_not_run_fails_and_without_permission_it_is_not_measured(
    fake: FakeRoot, kvm: Callable[[], None], verdict: Verdict
) -> None:
    results = examine(fake, run_instruction=kvm)
    assert results["kvm-runs"].finding.verdict is verdict
    assert find_status(list(results.values())) == (1 if verdict is Verdict.FAIL else 8)


def missing(words: Sequence[str]) -> Completed:
    raise CommandError(f"`{words[0]}` is not installed")


def refused(words: Sequence[str]) -> Completed:
    raise CommandError(f"cannot start `{words[0]}`", errno=errno.EACCES)


def silent(_: Sequence[str]) -> Completed:
    return Completed(1, "", "error: failed to connect to the hypervisor\nerror: Failed to connect socket")


def slow(words: Sequence[str]) -> Completed:
    raise CommandError(f"`{words[0]}` timed out after 10 s")


def closed(_: Sequence[str]) -> Completed:
    return Completed(1, "", "error: Failed to connect socket to '/var/run/libvirt/libvirt-sock-ro': Permission denied")


def deny_by_polkit(_: Sequence[str]) -> Completed:
    """As a user of a server without polkit, libvirt 11.3."""
    why = "error from service: GDBus.Error:org.freedesktop.systemd1.UnitMasked: Unit polkit.service is masked."
    return Completed(1, "", f"error: failed to connect to the hypervisor\nerror: {why}")


def busy(words: Sequence[str]) -> Completed:
    return Completed(0, VIRSH if words[-1] == "version" else "build\n\n", "")


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        (missing, (Verdict.FAIL, Verdict.NOT_MEASURED)),
        (silent, (Verdict.FAIL, Verdict.NOT_MEASURED)),
        (deny_by_polkit, (Verdict.NOT_MEASURED, Verdict.NOT_MEASURED)),
        (slow, (Verdict.FAIL, Verdict.NOT_MEASURED)),
        (refused, (Verdict.NOT_MEASURED, Verdict.NOT_MEASURED)),
        (closed, (Verdict.NOT_MEASURED, Verdict.NOT_MEASURED)),
        (busy, (Verdict.PASS, Verdict.FAIL)),
    ],
)
def test_libvirt_that_is_missing_or_silent_or_has_guests(
    fake: FakeRoot, answer: Callable[[Sequence[str]], Completed], verdicts: tuple[Verdict, Verdict]
) -> None:
    results = examine(fake, execute=answer)
    assert tuple(results[name].finding.verdict for name in ("libvirt", "other-guests")) == verdicts
    assert ("install libvirt" in results["libvirt"].finding.remedy) == (answer is missing)


def test_software_edge_needs_the_device_nodes_of_its_guests(fake: FakeRoot) -> None:
    for pf in Facts(fake).topology.pfs:
        (fake.path / f"sys/bus/pci/devices/{pf.address}/sriov_totalvfs").unlink()
    finding = examine(fake)["software-edge"].finding
    assert (finding.verdict, "/dev/net/tun and /dev/vhost-net are missing" in finding.found) == (Verdict.FAIL, True)
    for name in ("dev/net/tun", "dev/vhost-net"):
        fake.add(name)
    assert examine(fake)["software-edge"].finding.verdict is Verdict.PASS


def test_virsh_that_hangs_is_called_once(fake: FakeRoot) -> None:
    calls: list[Sequence[str]] = []

    def hang(words: Sequence[str]) -> Completed:
        calls.append(words)
        return slow(words)

    assert examine(fake, execute=hang)["other-guests"].finding.found == "`virsh` timed out after 10 s"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Using library: libvirt 8.0.0\nRunning hypervisor: QEMU 8.2.0\n", Verdict.FAIL),
        ("Using library: libvirt 9.0.0\nRunning hypervisor: QEMU 6.2.0\n", Verdict.FAIL),
        ("Using library: libvirt 9.0.0\nRunning hypervisor: QEMU 7.2.13\n", Verdict.PASS),
        ("Using library: libvirt x\n", Verdict.NOT_MEASURED),
        ("", Verdict.NOT_MEASURED),
    ],
)
def test_versions_of_libvirt_and_qemu(fake: FakeRoot, text: str, verdict: Verdict) -> None:
    assert examine(fake, execute=lambda _: Completed(0, text, ""))["libvirt"].finding.verdict is verdict


def test_remedies_use_the_words_of_the_firmware(fake: FakeRoot) -> None:
    empty(fake)
    for vendor, flags, words in (
        ("AuthenticAMD", "", "`SVM Mode`"),
        ("GenuineIntel", "", "`Intel Virtualization Technology`"),
        ("GenuineIntel", "hypervisor", "on its host"),
    ):
        fake.add("proc/cpuinfo", f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t: fpu {flags}\n")
        assert words in examine(fake)["kvm-runs"].finding.remedy
    shutil.rmtree(fake.path / "sys/kernel/iommu_groups")
    fake.add("proc/cpuinfo", "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t: fpu svm\n")
    fake.add("proc/cmdline", "quiet amd_iommu=off")
    assert "`IOMMU` (AMD-Vi" in examine(fake)["iommu"].finding.remedy
    assert "remove amd_iommu=off" in examine(fake)["iommu"].finding.remedy


def test_irqbalance_that_leaves_guest_cpus_alone_is_no_finding(fake: FakeRoot) -> None:
    add_thread(fake, 900, 900, "irqbalance", "0-1")
    for environment, verdict in (("", Verdict.PASS), ("IRQBALANCE_BANNED_CPULIST=2-6", Verdict.FAIL)):
        fake.add("proc/900/environ", environment)
        assert examine(fake)["other-programs"].finding.verdict is verdict
    fake.add("proc/900/environ", "")
    fake.read_errors["proc/900/environ"] = errno.EACCES
    assert examine(fake)["other-programs"].finding.found == "running: irqbalance"


ODD = ["sys/class/iommu/ivhd0/amd-iommu/features", "sys/devices/system/cpu/cpufreq/policy2/affected_cpus",
       "sys/devices/system/cpu/cpu2/cpuidle/state0/latency", "sys/devices/system/edac/mc/mc0/ue_count",
       "sys/devices/system/node/has_memory", "sys/module/kvm_amd/parameters/nested", "proc/mounts", "proc/meminfo"]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_text_of_a_file_breaks_only_the_check_that_reads_it(fake: FakeRoot, name: str) -> None:
    before = {check for check, result in examine(fake).items() if result.finding.verdict is Verdict.PASS}
    for text in ("", "-", "\0", "18446744073709551616", "x" * 5000):
        fake.add(name, text)
        results = examine(fake)
        assert len(before - {check for check, result in results.items() if result.finding.verdict is Verdict.PASS}) <= 2
        assert all(result.finding.found for result in results.values())


def test_shared_lists_of_files_that_cannot_be_read_hide_no_check(fake: FakeRoot) -> None:
    """A server without a PCI bus has cores and pages; one without the topology of its CPUs has no whole cores."""
    shutil.rmtree(fake.path / "sys/bus/pci")
    results = examine(fake)
    for name in ("cores", "isolation", "huge-pages", "iommu-overrides"):
        assert results[name].finding.verdict is Verdict.PASS, results[name].finding
    assert results["sr-iov"].finding.verdict is Verdict.NOT_MEASURED
    for folder in fake.path.glob("sys/devices/system/cpu/cpu*/topology"):
        (folder / "core_cpus_list").unlink(missing_ok=True)
    fake.add("sys/devices/system/cpu/online", "0-6")
    results = examine(fake)
    assert {results[name].finding.verdict for name in ("cores", "smt-siblings")} == {Verdict.NOT_MEASURED}


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("error: failed to get the hypervisor version\nerror: Cannot find suitable emulator for x86_64", "install QEMU"),
        ("error: failed to connect to the hypervisor\nerror: Failed to connect socket: No such file or directory", "start it"),
    ],
)
def test_remedy_for_libvirt_without_qemu_is_to_install_it(fake: FakeRoot, text: str, remedy: str) -> None:
    finding = examine(fake, execute=lambda _: Completed(1, "", text))["libvirt"].finding
    assert (finding.verdict, remedy in finding.remedy) == (Verdict.FAIL, True)


def test_output_of_virsh_is_not_translated(fake: FakeRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "virsh"
    program.write_text(
        '#!/bin/sh\n[ "$LC_ALL" = C ] && echo "Using library: libvirt 11" || echo "Verwende Bibliothek: libvirt 11"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    facts = Facts(fake)
    (check,) = (check for check in CHECKS if check.name == "libvirt")
    assert check.measure(facts).found == "libvirt 11"


def hide_processes(fake: FakeRoot) -> None:
    """As in a container, or by the option hidepid of /proc."""
    for name in ("stat", "status"):
        (fake.path / "proc/2/task/2" / name).unlink()


def hide_settings(fake: FakeRoot) -> None:
    shutil.rmtree(fake.path / "sys/kernel/mm")


def hide_idle_states(fake: FakeRoot) -> None:
    shutil.rmtree(fake.path / "sys/devices/system/cpu/cpu3/cpuidle")


_POLICY = "sys/devices/system/cpu/cpufreq/policy2"
NOT_KNOWN: list[tuple[str, Callable[[FakeRoot], object]]] = [
    ("smt-siblings", remove("sys/devices/system/cpu/present")),
    ("vulnerabilities", write("sys/devices/system/cpu/vulnerabilities/mmio_stale_data", "Unknown: No mitigations")),
    ("isolation", lambda fake: fake.read_errors.update({"sys/module/kvm/parameters/nx_huge_pages": errno.EACCES})),
    ("kernel-options", lambda fake: fake.read_errors.update({"sys/devices/system/cpu/nohz_full": errno.EACCES})),
    ("other-programs", hide_processes),
    ("page-merging", hide_settings),
    ("transparent-huge-pages", hide_settings),
    ("clock-source", remove("sys/devices/system/clocksource/clocksource0/current_clocksource")),
    ("qemu-confinement", remove("sys/kernel/security/lsm")),
    ("vulnerabilities", write("sys/devices/system/cpu/vulnerabilities/mmio_stale_data", "")),
    ("frequency", write(f"{_POLICY}/affected_cpus", "2 3")),
    ("frequency", remove(f"{_POLICY}/affected_cpus")),
    ("frequency", remove(f"{_POLICY}/scaling_governor")),
    ("idle-states", hide_idle_states),
    ("device-interrupts", write("sys/module/kvm_amd/parameters/avic", "N")),
    ("device-interrupts", write("sys/class/iommu/ivhd0/amd-iommu/features", "f77ef22094ada:200000")),
    ("nested-guests", write("sys/module/kvm_amd/parameters/nested", "")),
    ("uplink-owner", remove("sys/class/net/nic0/ifindex")),
    ("uplink-owner", write("run/systemd/netif/links/2", "ADMIN_STATE=pending")),
]


@pytest.mark.parametrize(("name", "hide"), NOT_KNOWN, ids=[f"{name}-{index}" for index, (name, _) in enumerate(NOT_KNOWN)])
def test_what_the_kernel_does_not_show_is_not_measured(fake: FakeRoot, name: str, hide: Callable[[FakeRoot], object]) -> None:
    hide(fake)
    assert examine(fake)[name].finding.verdict is Verdict.NOT_MEASURED


def test_setting_that_cannot_be_read_hides_no_wrong_one(fake: FakeRoot) -> None:
    fake.read_errors["sys/devices/system/cpu/nohz_full"] = errno.EACCES
    fake.add("proc/sys/vm/stat_interval", "1")
    finding = examine(fake)["isolation"].finding
    assert (finding.verdict, finding.found) == (Verdict.FAIL, "stat_interval is 1")


def test_kernel_that_cannot_stop_the_tick_is_unfit(fake: FakeRoot) -> None:
    (fake.path / "sys/devices/system/cpu/nohz_full").unlink()
    results = examine(fake)
    finding = results["kernel-options"].finding
    assert (finding.verdict, finding.needed) == (Verdict.FAIL, "a kernel with CONFIG_NO_HZ_FULL")
    assert results["kernel-options"].is_fault
    assert results["isolation"].finding.verdict is Verdict.PASS, "the other settings are right"
    (fake.path / "sys/devices/system/cpu/isolated").unlink()  # sysfs is not visible, which says nothing about the kernel
    assert {examine(fake)[name].finding.verdict for name in ("kernel-options", "isolation")} == {Verdict.NOT_MEASURED}


def test_whole_cores_may_be_offline(fake: FakeRoot) -> None:
    fake.add("sys/devices/system/cpu/online", "0-5")
    finding = examine(fake)["smt-siblings"].finding
    assert (finding.verdict, finding.found) == (Verdict.PASS, "each online core has all its threads; CPUs 6-7 are offline")


def test_groups_that_vfio_made_without_an_iommu_are_none_of_an_iommu(fake: FakeRoot) -> None:
    drive_without_iommu(fake)
    results = examine(fake)
    assert {results[name].finding.verdict for name in ("iommu", "iommu-groups")} == {Verdict.FAIL}


def test_some_core_must_be_left_for_guests(fake: FakeRoot) -> None:
    finding = examine(fake, "0-7")["cores"].finding
    assert (finding.verdict, "all of them for the host" in finding.found) == (Verdict.FAIL, True)


def test_selinux_that_enforces_its_policy_confines_qemu(fake: FakeRoot) -> None:
    fake.add("sys/kernel/security/lsm", "lockdown,capability,selinux")
    for text, verdict in (("0", Verdict.FAIL), ("1", Verdict.PASS)):
        fake.add("sys/fs/selinux/enforce", text)
        assert examine(fake)["qemu-confinement"].finding.verdict is verdict


def test_programs_that_work_against_the_manager_are_named(fake: FakeRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "find_programs", lambda _, *names: tuple(name for name in names if name == "irqbalance"))
    finding = examine(fake)["other-programs"].finding
    assert (finding.verdict, finding.found) == (Verdict.FAIL, "running: irqbalance")
    monkeypatch.setattr("orchestrator.doctor.management.find_tuned", lambda _: Tuned(("balanced",), ""))
    finding = examine(fake)["other-programs"].finding
    assert "disable --now irqbalance tuned`" in finding.remedy


def empty(fake: FakeRoot) -> FakeRoot:
    """Without network functions, IOMMU, huge pages and KVM."""
    for pf in Facts(fake).topology.pfs:
        (fake.path / f"sys/bus/pci/devices/{pf.address}/sriov_totalvfs").unlink()
    (fake.path / "sys/class/misc/kvm/dev").unlink()
    (fake.path / "sys/class/misc/kvm").rmdir()
    return fake


def test_server_without_the_hardware_fails_and_asks_for_it(fake: FakeRoot) -> None:
    results = examine(empty(fake))
    verdicts = {name: results[name].finding.verdict for name in ("kvm-runs", "sr-iov", "uplink-link", "vepa")}
    assert verdicts == {
        "kvm-runs": Verdict.FAIL, "sr-iov": Verdict.FAIL, "uplink-link": Verdict.NOT_MEASURED, "vepa": Verdict.NOT_MEASURED,
    }  # fmt: skip
    assert "--accept software-edge" in results["sr-iov"].finding.needed


@pytest.mark.parametrize("name", ["proc/cpuinfo", "proc/swaps", "proc/interrupts", "sys/kernel/mm/ksm/run", "proc/mounts"])
def test_file_that_cannot_be_read_or_parsed_hides_no_other_check(fake: FakeRoot, name: str) -> None:
    for text in (None, "\udcff", ""):
        if text is None:
            (fake.path / name).unlink()
        else:
            (fake.path / name).write_bytes(text.encode(errors="surrogateescape"))
        results = list(examine(fake).values())
        assert len(results) == len(CHECKS)
        assert all(result.finding.found for result in results)


def test_each_check_is_broken_by_a_test_and_is_in_the_documents() -> None:
    broken = {name for name, _ in BROKEN} | {
        "kvm-runs",
        "sr-iov",
        "uplink-link",
        "vepa",
        "libvirt",
        "other-guests",
        "other-programs",
    }
    rest = {"cores", "iommu", "vfio", "uplink-node", "software-edge", "disk-space"}  # of servers without the hardware
    assert broken | rest == {check.name for check in CHECKS}
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    wanted = [
        f"| `{check.name}` | {check.principle} | {check.title} | {check.source} | {'required' if check.required else 'advice'} |"
        for check in CHECKS
    ]
    assert rows == wanted


def test_report_groups_checks_by_principle(fake: FakeRoot) -> None:
    results = list(examine(empty(fake)).values())
    text = "\n".join(build_lines(results))
    for principle in Principle:
        assert f"{principle}: " in text
    assert text.splitlines()[-1].startswith("This server is not ready for NoHype: ")
    found = build_json(results)
    assert found["verdict"] == "fail"
    assert found["principles"]["memory allocated in advance"] == "pass"
    assert [check["name"] for check in found["checks"]] == [check.name for check in CHECKS]


def test_command_prints_json_and_refuses_odd_cpus() -> None:
    result = CliRunner().invoke(nohype, ["doctor", "--json"], standalone_mode=False)
    assert json.loads(result.output)["verdict"] in ("pass", "fail", "not measured")
    assert result.return_value in (0, 1, 8)
    result = CliRunner().invoke(nohype, ["doctor", "--housekeeping", "0-x"])
    assert result.exit_code == 2
    assert "--housekeeping" in result.output
    for text, why in (("8000", "CPUs 8000 are not online"), ("", "no CPUs given")):
        result = CliRunner().invoke(nohype, ["doctor", "--housekeeping", text])
        assert (result.exit_code, why in result.output) == (2, True), result.output


def test_one_file_needs_no_packages(tmp_path: Path) -> None:
    """-S: without installed packages; -I: without the folder and the environment."""
    file = tmp_path / "nohype-doctor.pyz"
    file.write_bytes(build_bundle())
    assert build_bundle() == file.read_bytes()

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-I", file, *words], capture_output=True, text=True, timeout=120, check=False
        )

    done = call("--json")
    assert done.stderr == ""
    assert len(json.loads(done.stdout)["checks"]) == len(CHECKS)
    done = call("--housekeeping", "x")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    done = call("--housekeeping", "8000")
    assert (done.returncode, "CPUs 8000 are not online" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
    done = call("--housekeeping", "")
    assert (done.returncode, "no CPUs given" in done.stderr) == (2, True)


def test_one_file_ends_without_a_traceback(tmp_path: Path) -> None:
    """With an older Python, whose library lacks what the modules import; and if nobody reads its output any more."""
    file = tmp_path / "nohype-doctor.pyz"
    file.write_bytes(build_bundle())
    old = "import runpy, sys; sys.version_info = (3, 9, 2); runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-S", "-I", "-c", old, file], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("nohype-doctor needs Python 3.11 or later, this is 3.9\ninstall a later one next to it: ")
    done = subprocess.run(
        [sys.executable, "-S", file], capture_output=True, text=True, timeout=120, env={"PYTHONIOENCODING": "ascii"}, check=False
    )
    assert (done.returncode in (0, 1, 8), done.stderr) == (True, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-S", "-I", file], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    assert (done.returncode, done.stderr) == (74, "nohype-doctor: cannot write the results: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-I", file], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
