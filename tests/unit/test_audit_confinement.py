"""qemu-confined passes on what libvirt sets up, and fails for each way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.audit.confinement import Confined, prove_qemu_confined, read_confined
from orchestrator.host.confinement import Confinement, ThreadCredentials
from orchestrator.hypervisor.guests import EmulatedNic
from orchestrator.model.proof import Verdict
from tests.fakes.root import build_host
from tests.harness.audit_data import GUEST1, GUEST2

THREADS = tuple(
    ThreadCredentials(tid, frozenset({64055}), frozenset({993, 64055}), 0, no_new_privileges=True, seccomp=2)
    for tid in (GUEST1.pid, *(vcpu.tid for vcpu in GUEST1.vcpus))
)
LABEL = f"libvirt-{GUEST1.uuid} (enforce)"
FILES = (
    "/dev/null", "anon_inode:kvm-vm", "anon_inode:[eventfd]", "/dev/vfio/9", "socket:[123]", "pipe:[5]", "/dev/kvm",
    "/dev/hugepages/libvirt/qemu/1-guest1/qemu_back_mem.pc.ram.x (deleted)", "/memfd:pc.ram (deleted)",
    "/run/libvirt/qemu/guest1.pid", "/dev/ptmx", "/dev/hugepages1G/libvirt/qemu/71-guest1/qemu_back_mem.pc.ram.y (deleted)",
)  # fmt: skip
GOOD = Confined(
    Confinement(THREADS, LABEL, None, {"mnt": True, "net": False, "pid": False, "user": False}), FILES, frozenset(["/dev/vfio/9"])
)


def broken(**fields: object) -> Confined:
    return replace(GOOD, confinement=replace(GOOD.confinement, **fields))  # type: ignore[arg-type]


def one_thread(**fields: object) -> Confined:
    return broken(threads=(*THREADS[:-1], replace(THREADS[-1], **fields)))  # type: ignore[arg-type]


def with_files(*names: str, own: tuple[str, ...] = ()) -> Confined:
    return replace(GOOD, files=(*FILES, *names), own=GOOD.own | frozenset(own))


SELINUX = "system_u:system_r:svirt_t:s0:c87,c520"


def test_what_libvirt_sets_up_passes_with_typed_values() -> None:
    proof = prove_qemu_confined(GUEST1, GOOD, {"guest2": f"libvirt-{GUEST2.uuid} (enforce)"})
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
    assert proof.values == {
        "users": "64055", "groups": "993 64055", "threads": 3, "threads_without_seccomp_filter": 0,
        "threads_that_may_gain_privileges": 0, "capabilities": "0x0", "label": LABEL, "namespaces": "mnt",
        "open_files": len(FILES), "unexpected_open_files": 0,
    }  # fmt: skip


def test_selinux_passes() -> None:
    state = broken(label=SELINUX, selinux_enforcing=True)
    assert prove_qemu_confined(GUEST1, state, {"guest2": "system_u:system_r:svirt_t:s0:c1,c2"}).verdict == Verdict.PASS


@pytest.mark.parametrize(
    ("state", "finding"),
    [
        (one_thread(uids=frozenset({64055, 0})), "runs as root"),
        (one_thread(gids=frozenset({0})), "is in the group of root"),
        (one_thread(capabilities=1 << 21), "has capabilities 0x200000"),
        (one_thread(seccomp=0), "has no seccomp filter (mode 0)"),
        (one_thread(no_new_privileges=False), "may gain privileges"),
        (broken(label=None), "no security label"),
        (broken(label="unconfined"), "is not a profile that confines QEMU"),
        (broken(label=LABEL.replace("enforce", "complain")), "is in mode complain, expected enforce"),
        (broken(label="/usr/sbin/libvirtd (enforce)"), "is not that of this guest"),
        (broken(label=f"libvirt-{GUEST2.uuid} (enforce)"), "is not that of this guest"),
        (broken(label="garbage"), "is not a profile that confines QEMU"),
        (broken(label=SELINUX, selinux_enforcing=False), "SELinux is not enforcing"),
        (broken(label="system_u:system_r:virtd_t:s0", selinux_enforcing=True), "has the type virtd_t"),
        (broken(label="garbage", selinux_enforcing=True), "has the type none"),
        (broken(namespaces={"mnt": False}), "namespace mnt is that of the host"),
        (broken(namespaces={}), "namespace mnt is that of the host"),
        (with_files("/dev/sda"), "open file /dev/sda"),
        (with_files("/dev/mem"), "open file /dev/mem"),
        (with_files("/etc/shadow"), "open file /etc/shadow"),
        (with_files("/etc/shadow (deleted)"), "open file /etc/shadow (deleted)"),
        (with_files("/run/libvirt/qemu/guest2.pid"), "open file /run/libvirt/qemu/guest2.pid"),
        (with_files("/dev/hugepages/libvirt/qemu/2-guest2/ram (deleted)"), "open file /dev/hugepages/libvirt/qemu/2-guest2/ram"),
        (with_files("/dev/hugepages/libvirt/qemu/1-guest1/ram"), "open file /dev/hugepages/libvirt/qemu/1-guest1/ram"),
        (with_files("/dev/vfio/10"), "open file /dev/vfio/10"),
        (with_files("/dev/vfio/devices/vfio3"), "open file /dev/vfio/devices/vfio3"),
        (with_files("/dev/tap7"), "open file /dev/tap7"),
        (with_files("/dev/dm-3", own=("/dev/dm-4",)), "open file /dev/dm-3"),
    ],
)
def test_each_way_out_fails(state: Confined, finding: str) -> None:
    proof = prove_qemu_confined(GUEST1, state, {})
    assert proof.verdict == Verdict.FAIL
    assert finding in proof.evidence[0]


@pytest.mark.parametrize(("label", "enforcing"), [(LABEL, None), (SELINUX, True)])
def test_label_of_two_guests_fails(label: str, enforcing: bool | None) -> None:
    proof = prove_qemu_confined(GUEST1, broken(label=label, selinux_enforcing=enforcing), {"guest2": label})
    assert proof.verdict == Verdict.FAIL
    assert proof.evidence[0] == f"label {label} is also that of guest2"


def test_process_without_threads_is_not_measured() -> None:
    assert prove_qemu_confined(GUEST1, broken(threads=()), {}).verdict == Verdict.NOT_MEASURED


STATUS = (
    "Uid:\t64055\t64055\t64055\t64055\nGid:\t1\t1\t1\t1\nGroups:\t\nCapInh:\t0\nCapPrm:\t0\nCapEff:\t0\nCapAmb:\t0\n"
    "NoNewPrivs:\t1\nSeccomp:\t2"
)


@pytest.mark.parametrize(
    ("disk", "target", "opened"),
    [
        ("/dev/vg/web", "../dm-3", "/dev/dm-3"),
        ("/dev/sdb", None, "/dev/sdb"),
        ("/var/lib/disks/web.raw", None, "/var/lib/disks/web.raw"),
    ],
)
def test_emulated_disk_of_the_guest_is_expected(tmp_path: Path, disk: str, target: str | None, opened: str) -> None:
    host = build_host(tmp_path, f"proc/{GUEST1.pid}/attr/current = {LABEL}")
    host.add(f"proc/{GUEST1.pid}/task/{GUEST1.pid}/status", STATUS)
    for pid, space in ((GUEST1.pid, "mnt:[5]"), (1, "mnt:[4]")):
        host.add_link(f"proc/{pid}/ns/mnt", space)
    host.add_link(f"proc/{GUEST1.pid}/fd/9", opened)
    add: Callable[[str, str], None] = host.add_link if target else host.add
    add(disk.lstrip("/"), target or "")
    for disks, verdict in (((disk,), Verdict.PASS), ((), Verdict.FAIL)):
        guest = replace(GUEST1, disks=disks)
        assert prove_qemu_confined(guest, read_confined(host, guest), {}).verdict == verdict


@pytest.mark.parametrize(
    ("opened", "verdict"),
    [
        ("/dev/vfio/vfio", Verdict.PASS),
        ("/dev/vfio/9", Verdict.PASS),
        ("/dev/vfio/devices/vfio3", Verdict.PASS),
        ("/dev/tap7", Verdict.PASS),
        ("/dev/vfio/10", Verdict.FAIL),
        ("/dev/vfio/devices/vfio4", Verdict.FAIL),
        ("/dev/tap8", Verdict.FAIL),
    ],
)
def test_only_devices_of_the_guest_are_expected(tmp_path: Path, opened: str, verdict: Verdict) -> None:
    (address,) = GUEST1.hostdevs
    host = build_host(tmp_path, f"proc/{GUEST1.pid}/attr/current = {LABEL}\nsys/class/net/nhtap0/ifindex = 7")
    host.add(f"proc/{GUEST1.pid}/task/{GUEST1.pid}/status", STATUS)
    for pid, space in ((GUEST1.pid, "mnt:[5]"), (1, "mnt:[4]")):
        host.add_link(f"proc/{pid}/ns/mnt", space)
    host.add_link(f"sys/bus/pci/devices/{address}/iommu_group", "../../../kernel/iommu_groups/9")
    host.add(f"sys/bus/pci/devices/{address}/vfio-dev/vfio3/dev", "1:1")
    host.add_link(f"proc/{GUEST1.pid}/fd/9", opened)
    guest = replace(GUEST1, nics=(EmulatedNic("nhtap0", "52:54:00:00:00:01"), EmulatedNic("", "52:54:00:00:00:02")))
    assert prove_qemu_confined(guest, read_confined(host, guest), {}).verdict == verdict
