"""Every proof passes on two real guests, and fails when its property is broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.audit.catalogue import PROOFS, ComparisonRow
from orchestrator.host.netlink import set_hairpin
from orchestrator.lab import switch
from orchestrator.model.proof import WEAKER, Proof, Verdict
from orchestrator.waiting import wait_until
from tests.lab.conftest import LINK_UP, LabHost

pytestmark = pytest.mark.usefixtures("guests")

Faults = dict[tuple[str, str], Proof]


def test_all_proofs_pass(host: LabHost) -> None:
    proofs = host.proofs(frames=50)
    assert {name for name, _ in proofs} == {row.name for row in PROOFS if not isinstance(row, ComparisonRow)}
    assert {key: proof.evidence for key, proof in proofs.items() if proof.verdict != Verdict.PASS} == {}


def test_vepa_fails_without_hairpin(host: LabHost) -> None:
    port = switch.port(host.lab.name)
    set_hairpin(port.interface, port.netns, on=False)
    try:
        assert host.proofs(frames=5)["vepa", "host"].verdict == Verdict.FAIL
    finally:
        set_hairpin(port.interface, port.netns, on=True)


def test_vepa_fails_when_the_nic_switches_locally(host: LabHost) -> None:
    """The register is changed outside the manager; a link event, which a PF reset causes, makes the manager restore it."""
    read_and_set = (
        "import json,struct,mmap,os,sys;f=os.open('/sys/bus/pci/devices/'+sys.argv[1]+'/resource0',os.O_RDWR|os.O_SYNC)"
    )
    read_and_set += ";m=mmap.mmap(f,0x20000);v,=struct.unpack_from('<I',m,0x3500);struct.pack_into('<I',m,0x3500,v|1<<31)"
    pf = host.run("basename $(readlink /sys/class/net/nic0/device)").stdout.strip()
    with host.changed(f'python3 -c "{read_and_set}" {pf}', f"ip link set nic0 down && {LINK_UP}"):
        broken = host.proofs(frames=20)["vepa", "host"]

    def measure_again() -> Proof:
        return host.proofs(frames=20)["vepa", "host"]

    restored = wait_until(measure_again, lambda proof: proof.verdict == Verdict.PASS, timeout=60, interval=1)
    assert broken.verdict == Verdict.FAIL
    assert any("switches locally between VFs" in line for line in broken.evidence)
    assert restored.verdict == Verdict.PASS, restored.evidence


@pytest.fixture(scope="module")
def first_faults(host: LabHost, guests: list[dict[str, Any]]) -> Faults:
    """An audit takes seconds: one for several faults, each of which another proof or guest shows."""
    two, cpu = guests[1], guests[0]["cpus"][0]
    start = f"systemd-run --quiet --collect --slice intruder --unit intruder -p CPUAffinity={cpu} sh -c 'while :; do :; done'"
    tid = host.run(f"grep -l 'CPU 0/KVM' /proc/$(cat /run/libvirt/qemu/{two['name']}.pid)/task/*/comm").stdout.split("/")[4]
    cpuset = f"/sys/fs/cgroup$(cut -d: -f3 /proc/{tid}/cgroup)/cpuset.cpus"
    vcpu = two["cpus"][0]
    widen = f"echo 0-7 > {cpuset} && taskset -pc 0-7 {tid}"
    narrow = f"echo {vcpu} > {cpuset} && taskset -pc {vcpu} {tid}"
    mask = "/sys/devices/virtual/workqueue/cpumask"
    pid = host.run("systemctl show --value -p MainPID nohyped").stdout.strip()
    slices = "/sys/fs/cgroup/system.slice/cpuset.cpus"
    unsafe = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
    with (
        host.changed(start, "systemctl stop intruder"),
        host.changed(f"echo ff > {mask}", f"echo 3 > {mask}"),
        host.changed(widen, narrow),
        host.changed(f"echo 0-7 > {slices}; taskset -apc 6 {pid}", f"taskset -apc 0-1 {pid}; echo 0-1 > {slices}"),
        host.changed(f"echo Y > {unsafe}", f"echo N > {unsafe}"),
    ):
        return host.proofs()


@pytest.fixture(scope="module")
def second_faults(host: LabHost, guests: list[dict[str, Any]]) -> Faults:
    """As ``first_faults``. Each character on the serial console is a port write that QEMU handles."""
    one, two = guests
    pin, emulator = f"virsh vcpupin {two['name']} 1", f"virsh emulatorpin {one['name']}"
    chatter = "while :; do nohype guest tell {} counters; done"
    with (
        host.unconfined(two),
        host.changed(f"{pin} {one['cpus'][0]}", f"{pin} {two['cpus'][1]}"),
        host.unconfined(one),
        host.changed(f"{emulator} 6", f"{emulator} 0-1"),
        host.changed(
            f"systemd-run --quiet --collect --unit chatter sh -c '{chatter.format(one['name'])}'", "systemctl stop chatter"
        ),
    ):
        return host.proofs()


def check_failed(proof: Proof, *words: str) -> None:
    """One line of the evidence has all the words."""
    assert proof.verdict == Verdict.FAIL, proof.evidence
    assert proof.figure
    assert any(all(word in line for word in words) for line in proof.evidence), proof.evidence


@pytest.fixture(scope="module")
def long_ago(host: LabHost, guests: list[dict[str, Any]]) -> str:
    """A program that was on a guest's core for a moment, before all audits of this file; its name."""
    options = f"--quiet --wait --collect --slice intruder -p CPUAffinity={guests[0]['cpus'][0]}"
    host.run(f"systemd-run {options} sh -c 'printf passer-by > /proc/self/comm; sleep 0.1'")
    return "passer-by"


def test_program_that_ran_on_a_guest_core_for_a_moment_long_ago_is_named(
    long_ago: str, first_faults: Faults, guests: list[dict[str, Any]]
) -> None:
    """It ended before the audit began. The window of the audit, and other guests, do not have it."""
    limits = {name: line for (proof, name), found in first_faults.items() if proof == "core-quiet"
              for line in found.evidence if line.startswith(f"{WEAKER}since the start of the guest")}  # fmt: skip
    assert f"time slices of {long_ago} (" in limits[guests[0]["name"]], limits
    assert long_ago not in limits.get(guests[1]["name"], "")


def test_vepa_is_not_measured_without_traffic(first_faults: Faults) -> None:
    assert first_faults["vepa", "host"].verdict == Verdict.NOT_MEASURED


def test_core_exclusive_fails_with_a_busy_process_on_a_guest_core(first_faults: Faults, guests: list[dict[str, Any]]) -> None:
    cpu = guests[0]["cpus"][0]
    check_failed(first_faults["core-exclusive", guests[0]["name"]], "sh", f"may run on CPU {cpu} (allowed {cpu},")


def test_core_quiet_fails_with_a_busy_process_on_a_guest_core(first_faults: Faults, guests: list[dict[str, Any]]) -> None:
    check_failed(first_faults["core-quiet", guests[0]["name"]], "time slices of sh (")


def test_host_isolation_fails_with_wide_workqueues(first_faults: Faults) -> None:
    check_failed(first_faults["host-isolation", "host"], "workqueue is ff, wanted CPUs 0-1")


def test_core_exclusive_fails_when_a_vcpu_may_run_elsewhere(first_faults: Faults, guests: list[dict[str, Any]]) -> None:
    check_failed(
        first_faults["core-exclusive", guests[1]["name"]], "vCPU 0:", "may run on 0-1,", f"expected {guests[1]['cpus'][0]}"
    )


def test_manager_core_fails_when_the_manager_leaves_housekeeping(first_faults: Faults) -> None:
    check_failed(first_faults["manager-core", "host"], "nohyped", "may run on 6")


def test_interrupts_without_remapping_fail(first_faults: Faults, guests: list[dict[str, Any]]) -> None:
    check_failed(first_faults["device-isolated", guests[0]["name"]], "allow_unsafe_interrupts is Y")


def test_core_smt_fails_when_a_sibling_is_shared(second_faults: Faults, guests: list[dict[str, Any]]) -> None:
    assert second_faults["core-smt", guests[1]["name"]].verdict == Verdict.FAIL


def test_manager_core_fails_when_a_qemu_thread_leaves_housekeeping(second_faults: Faults, guests: list[dict[str, Any]]) -> None:
    check_failed(second_faults["manager-core", "host"], f"guest {guests[0]['name']}", "may run on 6")


def test_exits_fail_when_qemu_serves_port_writes(second_faults: Faults, guests: list[dict[str, Any]]) -> None:
    proof = second_faults["exits", guests[0]["name"]]
    assert proof.verdict == Verdict.FAIL, proof.evidence


UNMANAGED = """<domain type='kvm'><name>unmanaged</name><memory unit='MiB'>128</memory>
<memoryBacking><hugepages><page size='2' unit='MiB' nodeset='0'/></hugepages>{locked}</memoryBacking><vcpu>2</vcpu>
<cputune><vcpupin vcpu='0' cpuset='6'/><vcpupin vcpu='1' cpuset='7'/><emulatorpin cpuset='0-1'/></cputune>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>/var/lib/nohype/images/minimal/vmlinuz</kernel>
<initrd>/var/lib/nohype/images/minimal/initrd</initrd><cmdline>console=ttyS0 quiet</cmdline></os>
<features><acpi/><apic/></features><cpu mode='host-passthrough'/>
<devices><controller type='usb' model='none'/>{devices}<serial type='pty'/><memballoon model='none'/></devices></domain>"""


@pytest.fixture(scope="module")
def unmanaged(host: LabHost) -> Any:
    """A domain started outside the manager: unlocked, with an emulated device and a VF in an identity group (iommu=pt)."""
    free = host.run("readlink /sys/class/net/nic0/device/virtfn3").stdout.strip().rpartition("/")[2]
    _, bus, rest = free.split(":")
    slot, function = rest.split(".")
    address = f"<address domain='0' bus='0x{bus}' slot='0x{slot}' function='0x{function}'/>"
    hostdev = f"<hostdev mode='subsystem' type='pci' managed='no'><source>{address}</source></hostdev>"
    rng = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
    device = f"/sys/bus/pci/devices/{free}"
    host.run(f"echo identity > {device}/iommu_group/type && echo vfio-pci > {device}/driver_override")
    host.run(f"echo {free} > /sys/bus/pci/drivers_probe")
    xml = UNMANAGED.format(locked="", devices=hostdev + rng)
    host.run(f"cat > /tmp/unmanaged.xml <<'END'\n{xml}\nEND\nvirsh create /tmp/unmanaged.xml")
    yield host.proofs()
    host.run("virsh destroy unmanaged; rm /tmp/unmanaged.xml")
    host.run(f"echo {free} > {device}/driver/unbind; echo > {device}/driver_override; echo DMA > {device}/iommu_group/type")


def test_identity_default_domain_limits_the_proof(unmanaged: Any) -> None:
    """VFIO attaches a domain that translates, whatever domain the group has while no guest uses it."""
    proof = unmanaged["device-isolated", "unmanaged"]
    assert proof.verdict == Verdict.PASS, proof.evidence
    assert any(line.startswith(WEAKER) for line in proof.evidence)


@pytest.mark.parametrize("name", ["memory-static", "devices-minimal"])
def test_guest_with_unlocked_memory_and_extra_device_fails(unmanaged: Any, name: str) -> None:
    assert unmanaged[name, "unmanaged"].verdict == Verdict.FAIL, unmanaged[name, "unmanaged"].evidence


def test_managed_guests_pass_next_to_an_unmanaged_domain(unmanaged: Any, guests: list[dict[str, Any]]) -> None:
    for name in ("memory-static", "devices-minimal", "device-isolated", "core-smt"):
        assert unmanaged[name, guests[0]["name"]].verdict == Verdict.PASS
