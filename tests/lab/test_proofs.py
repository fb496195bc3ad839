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


def test_vepa_is_not_measured_without_traffic(host: LabHost) -> None:
    assert host.proofs(frames=0)["vepa", "host"].verdict == Verdict.NOT_MEASURED


def test_core_proofs_fail_with_a_busy_process_and_wide_workqueues(host: LabHost, guests: list[dict[str, Any]]) -> None:
    cpu, name = guests[0]["cpus"][0], guests[0]["name"]
    mask = "/sys/devices/virtual/workqueue/cpumask"
    start = f"systemd-run --quiet --collect --slice intruder --unit intruder -p CPUAffinity={cpu} sh -c 'while :; do :; done'"
    with host.changed(f"echo ff > {mask}; {start}", f"systemctl stop intruder; echo 3 > {mask}"):
        proofs = host.proofs()
    proof = proofs["core-exclusive", name]
    assert proof.verdict == Verdict.FAIL
    assert proof.figure
    assert any(f" {cpu}" in line for line in proof.evidence)
    assert proofs["core-quiet", name].verdict == Verdict.FAIL
    assert any("time slices of sh (" in line for line in proofs["core-quiet", name].evidence)
    assert proofs["host-isolation", "host"].verdict == Verdict.FAIL
    assert any("workqueue is ff, wanted CPUs 0-1" in line for line in proofs["host-isolation", "host"].evidence)


def test_core_exclusive_fails_when_a_vcpu_may_run_elsewhere(host: LabHost, guests: list[dict[str, Any]]) -> None:
    name, cpu = guests[0]["name"], guests[0]["cpus"][0]
    tid = host.run(f"grep -l 'CPU 0/KVM' /proc/$(cat /run/libvirt/qemu/{name}.pid)/task/*/comm").stdout.split("/")[4]
    cgroup = f"$(cut -d: -f3 /proc/{tid}/cgroup)"
    widen = f"echo 0-7 > /sys/fs/cgroup{cgroup}/cpuset.cpus && taskset -pc 0-7 {tid}"
    narrow = f"echo {cpu} > /sys/fs/cgroup{cgroup}/cpuset.cpus && taskset -pc {cpu} {tid}"
    with host.changed(widen, narrow):
        assert host.proofs()["core-exclusive", name].verdict == Verdict.FAIL


def test_core_smt_fails_when_a_sibling_is_shared(host: LabHost, guests: list[dict[str, Any]]) -> None:
    name, second = guests[1]["name"], guests[1]["cpus"][1]
    pin = f"virsh vcpupin {name} 1"
    with host.unconfined(guests[1]), host.changed(f"{pin} {guests[0]['cpus'][0]}", f"{pin} {second}"):
        proofs = host.proofs()
    assert proofs["core-smt", name].verdict == Verdict.FAIL


def test_manager_core_fails_when_the_manager_leaves_housekeeping(host: LabHost, guests: list[dict[str, Any]]) -> None:
    pid = host.run("systemctl show --value -p MainPID nohyped").stdout.strip()
    del guests
    slices = "/sys/fs/cgroup/system.slice/cpuset.cpus"
    away = f"echo 0-7 > {slices}; taskset -apc 6 {pid}"
    back = f"taskset -apc 0-1 {pid}; echo 0-1 > {slices}"
    with host.changed(away, back):
        assert host.proofs()["manager-core", "host"].verdict == Verdict.FAIL


def test_manager_core_fails_when_a_qemu_thread_leaves_housekeeping(host: LabHost, guests: list[dict[str, Any]]) -> None:
    name = guests[0]["name"]
    with host.unconfined(guests[0]), host.changed(f"virsh emulatorpin {name} 6", f"virsh emulatorpin {name} 0-1"):
        assert host.proofs()["manager-core", "host"].verdict == Verdict.FAIL


def test_exits_fail_when_qemu_serves_port_writes(host: LabHost, guests: list[dict[str, Any]]) -> None:
    """Each character on the serial console is a port write that QEMU handles."""
    name = guests[0]["name"]
    chatter = f"systemd-run --quiet --collect --unit chatter sh -c 'while :; do nohype guest tell {name} counters; done'"
    with host.changed(chatter, "systemctl stop chatter"):
        proof = host.proofs()["exits", name]
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


def test_interrupts_without_remapping_fail(host: LabHost, guests: list[dict[str, Any]]) -> None:
    parameter = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
    with host.changed(f"echo Y > {parameter}", f"echo N > {parameter}"):
        assert host.proofs()["device-isolated", guests[0]["name"]].verdict == Verdict.FAIL


@pytest.mark.parametrize("name", ["memory-static", "devices-minimal"])
def test_guest_with_unlocked_memory_and_extra_device_fails(unmanaged: Any, name: str) -> None:
    assert unmanaged[name, "unmanaged"].verdict == Verdict.FAIL, unmanaged[name, "unmanaged"].evidence


def test_managed_guests_pass_next_to_an_unmanaged_domain(unmanaged: Any, guests: list[dict[str, Any]]) -> None:
    for name in ("memory-static", "devices-minimal", "device-isolated", "core-smt"):
        assert unmanaged[name, guests[0]["name"]].verdict == Verdict.PASS
