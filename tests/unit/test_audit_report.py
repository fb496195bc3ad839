"""The whole audit on a host made of files: all proofs in order; a fact that cannot be read makes its proofs not measured."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from errno import EACCES
from pathlib import Path
from uuid import UUID

import pytest

from orchestrator.audit.catalogue import PROOFS, ComparisonRow
from orchestrator.audit.facts import SendCommand, Source
from orchestrator.audit.report import Auditor, summarize
from orchestrator.errors import HypervisorError, LedgerError
from orchestrator.host.core_counts import read_core_start
from orchestrator.host.survey import read_topology
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.core_start import CoreStart
from orchestrator.model.exits import ExitPolicy
from orchestrator.model.plan import NicPlan
from orchestrator.model.proof import WEAKER, Proof, Verdict
from orchestrator.model.topology import Topology
from orchestrator.values import CpuSet, MacAddress, PciAddress
from tests.fakes.root import HOSTS, FakeRoot, build_host
from tests.harness.audit_data import DATA, GUEST1, GUEST2, HOUSEKEEPING, load_maps
from tests.harness.isolation import add_isolation

PF = "sys/bus/pci/devices/0000:41:00.0/resource0"
# The captured host has its bound VFs at these addresses, in groups 9 and 10.
GUESTS = tuple(
    replace(guest, hostdevs=(PciAddress.parse(f"0000:41:10.{function}"),)) for guest, function in ((GUEST1, 0), (GUEST2, 2))
)
NICS = tuple(
    NicPlan(PciAddress.parse("0000:41:00.0"), "nic0", index, guest.hostdevs[0], MacAddress(f"02:4e:48:00:00:0{index}"))
    for index, guest in enumerate(GUESTS)
)
MANAGER = 4935
_STAT = "{tid} ({name}) S 0 0 0 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 1 0 {started} 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 17 {cpu} 0 0"
# The same of all threads of a QEMU (tests/data/audit/status-guest1.txt).
_CREDENTIALS = (
    "Uid:\t64055\t64055\t64055\t64055\nGid:\t64055\t64055\t64055\t64055\nGroups:\t993 64055\nCapInh:\t0\nCapPrm:\t0\n"
    "CapEff:\t0\nCapAmb:\t0\nNoNewPrivs:\t1\nSeccomp:\t2\n"
)


@dataclass(frozen=True)
class RecordingRoot(FakeRoot):
    """A fake host that records which files are read."""

    asked: set[str] = field(default_factory=set)

    def read_bytes(self, name: str) -> bytes:
        self.asked.add(name)
        return super().read_bytes(name)

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        self.asked.add(name)
        self._check(self.read_errors, name, "cannot read")
        return super().read_at(name, offset, length)


@pytest.fixture
def host(tmp_path: Path) -> RecordingRoot:
    """The captured lab host with a few of its threads and the memory of both guests."""
    fake = build_host(tmp_path, (HOSTS / "numa-guests.txt").read_text())
    host = RecordingRoot(fake.path)
    host.registers[host.real(PF), 0x3500] = 0x0000EFEF
    host.add("proc/stat", "cpu2 0 0 0 0 0 0 0 0 0 0\ncpu4 0 0 0 0 0 0 0 0 0 0")
    host.add("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N")
    for line in (DATA / "threads.txt").read_text().splitlines()[1:]:
        add_thread(host, *line.split(maxsplit=8))
    for pid, unit in ((MANAGER, "nohyped.service"), (491, "virtlogd.service"), (26, "")):
        host.add(f"proc/{pid}/cgroup", f"0::/system.slice/{unit}" if unit else "0::/")
    host.fake_net.make_vfs("nic0", 4)
    for index, nic in enumerate(NICS):
        host.fake_net.set_vf("nic0", index, mac=nic.mac)
    for number, guest in zip((9, 10), GUESTS, strict=True):
        add_qemu(host, guest, number)
    add_isolation(host)
    host.writes.clear()
    return host


def add_thread(host: FakeRoot, *words: str) -> None:
    """A line of threads.txt, if it is one of those that this host shall have: fewer make a quicker test."""
    pid, tid, flags, started, allowed, cpu, _, exec_start, name = words
    if int(pid) not in (26, 27, 103, 491, MANAGER, *(guest.pid for guest in GUESTS)):
        return
    folder = f"proc/{pid}/task/{tid}"
    host.add(f"{folder}/stat", _STAT.format(tid=tid, name=name, flags=flags, started=started, cpu=cpu))
    credentials = _CREDENTIALS if int(pid) in (guest.pid for guest in GUESTS) else ""
    host.add(f"{folder}/status", f"{credentials}Cpus_allowed_list:\t{allowed}")
    host.add(f"{folder}/sched", f"se.exec_start : {exec_start}")


def add_qemu(host: FakeRoot, guest: RunningGuest, group: int) -> None:
    """Memory, open files and IOMMU of a guest."""
    folder = f"proc/{guest.pid}"
    for name in ("smaps", "numa_maps", "status"):
        host.add(f"{folder}/{name}", (DATA / f"{name}-{guest.name}.txt").read_text())
    host.add(f"{folder}/cgroup", "0::/machine.slice/machine-qemu.scope/libvirt/emulator")
    host.add(f"{folder}/cmdline", f"qemu-system-x86_64\0-append\0quiet nohype.address=10.9.0.{guest.pid % 100}/24")
    host.add(f"{folder}/attr/current", f"libvirt-{guest.uuid} (enforce)")
    for pid, number in ((1, 1), (guest.pid, guest.pid)):
        host.add_link(f"proc/{pid}/ns/mnt", f"mnt:[{number}]")
    host.add_link(f"{folder}/fd/21", f"/dev/vfio/{group}")
    host.add_link(f"{folder}/fd/22", "/dev/vfio/vfio")
    (address,) = guest.hostdevs
    device = host.real(f"sys/bus/pci/devices/{address}")
    host.add_link(f"{device}/iommu", "../../../virtual/iommu/dmar0")
    host.add(f"sys/class/iommu/dmar0/devices/{address}")
    (pool,) = (mapping for mapping in load_maps(guest.name).mappings if mapping.huge)
    with (host.path / f"{folder}/pagemap").open("wb") as pagemap:  # sparse: 8 bytes for each 4 KB page of the address space
        for page in range(pool.start, pool.end, pool.page_size):
            pagemap.seek(page // 4096 * 8)
            frame = 0x140000 + (page - pool.start) // 4096
            pagemap.write(struct.pack("<Q", 1 << 63 | frame))


ReadExits = Callable[[UUID], tuple[Mapping[str, int], ...]]


def read_exits(_uuid: UUID) -> tuple[Mapping[str, int], ...]:
    return ({"exits": 5, "io_exits": 1, "mmio_exits": 0, "halt_exits": 4}, {"exits": 5, "io_exits": 1, "mmio_exits": 0})


def no_console(*_: object) -> str:
    raise AssertionError("no command may be sent to a guest")


@dataclass(frozen=True)
class StubHypervisor:
    """libvirt, as the audit uses it."""

    guests: tuple[RunningGuest, ...]
    unread: Mapping[str, str]
    exits: ReadExits

    def read_guests(self) -> tuple[tuple[RunningGuest, ...], Mapping[str, str]]:
        return self.guests, self.unread

    def read_exits(self, uuid: UUID) -> tuple[Mapping[str, int], ...]:
        return self.exits(uuid)


def audit(
    host: FakeRoot,
    guests: tuple[RunningGuest, ...] = GUESTS,
    topology: Topology | None = None,
    *,
    exits: ReadExits = read_exits,
    send: SendCommand = no_console,
    unread: Mapping[str, str] | None = None,
    frames: int = 0,
    nics: Sequence[NicPlan] = NICS,
    starts: Callable[[UUID], CoreStart | None] = lambda _: None,
    host_only: bool = False,
) -> tuple[Proof, ...]:
    source = Source(
        host, StubHypervisor(guests, unread or {}, exits), lambda: topology or read_topology(host), send, HOUSEKEEPING,
        ExitPolicy(2000, 10), window=0.01, nics=lambda: {guest.uuid: (nic,) for guest, nic in zip(GUESTS, nics, strict=True)},
        core_starts=starts,
    )  # fmt: skip
    return Auditor(source).run(frames, host_only=host_only)


def keys(guests: tuple[RunningGuest, ...] = GUESTS) -> list[tuple[str, str]]:
    """Name and subject of the proofs that an audit measures, in order."""
    return [
        (row.name, subject)
        for row in PROOFS
        if not isinstance(row, ComparisonRow)
        for subject in ([guest.name for guest in guests] if row.scope == "guest" else ["host"])
    ]


def verdicts(proofs: tuple[Proof, ...]) -> dict[tuple[str, str], Verdict]:
    return {(proof.name, proof.subject): proof.verdict for proof in proofs}


def test_all_proofs_pass_in_order_except_vepa_without_a_switch(host: RecordingRoot) -> None:
    proofs = audit(host)
    assert [(proof.name, proof.subject) for proof in proofs] == keys()
    bad = [proof for proof in proofs if proof.verdict != Verdict.PASS]
    assert [(proof.name, proof.verdict) for proof in bad] == [("vepa", Verdict.NOT_MEASURED)], bad
    assert host.writes == [], "an audit changes nothing"


def test_host_only_leaves_out_the_proofs_of_guests_and_does_not_sample_them(host: RecordingRoot) -> None:
    def refuse(_uuid: UUID) -> tuple[Mapping[str, int], ...]:
        raise AssertionError("exits are counted only for a proof of a guest")

    proofs = audit(host, host_only=True, exits=refuse)
    assert [(proof.name, proof.subject) for proof in proofs] == [key for key in keys() if key[1] == "host"]
    assert proofs == tuple(proof for proof in audit(host) if proof.subject == "host"), "the verdicts are those of a whole audit"


def test_host_only_fails_for_a_fault_of_the_host(host: RecordingRoot) -> None:
    proofs = audit(host, GUESTS[:1], host_only=True)
    assert verdicts(proofs)["memory-static", "host"] is Verdict.FAIL  # the pages of the other guest
    unread = audit(host, GUESTS[:1], host_only=True, unread={"guest2": "libvirt: no"})
    assert (unread[0].subject, unread[0].verdict) == ("guest2", Verdict.NOT_MEASURED)


def test_host_without_guests(host: RecordingRoot) -> None:
    proofs = audit(host, ())
    assert [(proof.name, proof.subject) for proof in proofs] == keys(())
    assert verdicts(proofs) == {
        ("manager-core", "host"): Verdict.PASS,
        ("memory-static", "host"): Verdict.FAIL,  # 256 pages are in use, but not by a guest
        ("host-isolation", "host"): Verdict.PASS,
        ("vepa", "host"): Verdict.NOT_MEASURED,
    }


def test_nic_back_in_veb_mode_fails(host: RecordingRoot) -> None:
    host.registers[host.real(PF), 0x3500] = 0x8000EFEF
    assert verdicts(audit(host))["vepa", "host"] == Verdict.FAIL


def test_identity_mapped_memory_fails(host: RecordingRoot) -> None:
    (pool,) = (mapping for mapping in load_maps("guest1").mappings if mapping.huge)
    with (host.path / f"proc/{GUEST1.pid}/pagemap").open("r+b") as pagemap:
        for page in range(pool.start, pool.end, pool.page_size):
            pagemap.seek(page // 4096 * 8)
            pagemap.write(struct.pack("<Q", 1 << 63 | (page - pool.start) // 4096))
    # Page 0 lies at address 0 for the guest; that frame is the one that means "hidden" too.
    found = verdicts(audit(host))
    assert found["device-isolated", "guest1"] != Verdict.PASS
    assert found["device-isolated", "guest2"] == Verdict.PASS


def test_interrupts_of_a_device_on_a_guest_core_fail(host: RecordingRoot) -> None:
    class Receiving(RecordingRoot):
        """CPU 2 gets an interrupt of the NIC between two readings."""

        def read_bytes(self, name: str) -> bytes:
            text = super().read_bytes(name)
            if name == "proc/interrupts":
                numbers = text.decode().replace("24: 0 0 0", f"24: 0 0 {len(self.writes)}")
                self.writes.append((name, ""))
                return numbers.encode()
            return text

    receiving = Receiving(host.path)
    found = {(proof.name, proof.subject): proof for proof in audit(receiving)}
    assert found["core-quiet", "guest1"].verdict == Verdict.FAIL
    assert "interrupts 24 (PCI-MSIX nic0)" in found["core-quiet", "guest1"].evidence[0]
    assert found["core-quiet", "guest2"].verdict == Verdict.PASS


def core_quiet(proofs: tuple[Proof, ...]) -> dict[str, Proof]:
    return {proof.subject: proof for proof in proofs if proof.name == "core-quiet"}


def test_what_happened_on_a_guests_cores_since_its_start_is_reported(host: RecordingRoot) -> None:
    host.add("proc/sys/kernel/random/boot_id", "boot-1")
    start = read_core_start(host, GUEST1.pid, CpuSet.parse("2-3"), at_launch=True)
    host.add("proc/softirqs", host.text("proc/softirqs").replace("NET_RX: 0 0 0 0", "NET_RX: 0 0 7 0"))
    found = core_quiet(audit(host, starts={GUEST1.uuid: start}.get))
    assert [proof.verdict for proof in found.values()] == [Verdict.PASS, Verdict.PASS], "it was before the measured time"
    assert found["guest1"].values["since_start_unexpected"] == 7
    assert any(line.startswith(WEAKER) and "7 softirqs NET_RX" in line for line in found["guest1"].evidence)
    assert any("no manager recorded the start" in line for line in found["guest2"].evidence)


def test_start_that_cannot_be_compared_limits_the_proof(host: RecordingRoot) -> None:
    def refuse(_uuid: UUID) -> CoreStart:
        raise LedgerError("the ledger is damaged")

    for proof in core_quiet(audit(host, starts=refuse)).values():
        assert proof.verdict == Verdict.PASS
        assert any(line.startswith(WEAKER) and "the ledger is damaged" in line for line in proof.evidence)


def test_vf_of_another_driver_fails(host: RecordingRoot) -> None:
    host.add_link(host.real("sys/bus/pci/devices/0000:41:10.0") + "/driver", "../../../../bus/pci/drivers/igbvf")
    assert verdicts(audit(host))["device-isolated", "guest1"] == Verdict.FAIL


def test_vf_that_qemu_does_not_hold_fails(host: RecordingRoot) -> None:
    (host.path / f"proc/{GUEST1.pid}/fd/21").unlink()
    assert verdicts(audit(host))["device-isolated", "guest1"] == Verdict.FAIL


def test_qemu_in_the_hosts_namespace_with_a_disk_of_the_host_fails(host: RecordingRoot) -> None:
    host.add_link(f"proc/{GUEST1.pid}/ns/mnt", "mnt:[1]")
    host.add_link(f"proc/{GUEST1.pid}/fd/30", "/dev/sda")
    (proof,) = (proof for proof in audit(host) if (proof.name, proof.subject) == ("qemu-confined", "guest1"))
    assert (proof.verdict, proof.figure, proof.values["unexpected_open_files"]) == (Verdict.FAIL, 2, 1)


def test_page_frames_that_the_kernel_hides_are_not_measured(host: RecordingRoot) -> None:
    (pool,) = (mapping for mapping in load_maps("guest1").mappings if mapping.huge)
    with (host.path / f"proc/{GUEST1.pid}/pagemap").open("r+b") as pagemap:
        pagemap.seek(pool.start // 4096 * 8)
        pagemap.write(struct.pack("<Q", 1 << 63))
    (proof,) = (proof for proof in audit(host) if (proof.name, proof.subject) == ("device-isolated", "guest1"))
    assert proof.verdict == Verdict.NOT_MEASURED
    assert "cannot read page frames from /proc/" in proof.evidence[0]


def test_unreadable_exit_counters_leave_the_other_proofs(host: RecordingRoot) -> None:
    def fail(_uuid: UUID) -> tuple[Mapping[str, int], ...]:
        raise HypervisorError("cannot read the exits: connection lost")

    found = verdicts(audit(host, exits=fail))
    assert [key for key in keys() if found[key] == Verdict.NOT_MEASURED] == [
        ("vepa", "host"),
        ("exits", "guest1"),
        ("exits", "guest2"),
    ]


def test_reply_without_counts_is_the_reason_in_vepa(host: RecordingRoot) -> None:
    asked = []

    def send(name: str, line: str, _timeout: float, uuid: UUID) -> str:
        asked.append((name, line, uuid))
        return "nohype: error ping there is no network interface\n"

    (proof,) = (proof for proof in audit(host, send=send, frames=20) if proof.name == "vepa")
    assert asked == [("guest1", f"ping 10.9.0.{GUEST2.pid % 100} 2", GUEST1.uuid)]
    assert proof.verdict == Verdict.NOT_MEASURED
    assert "there is no network interface" in proof.evidence[0]


def test_guests_of_different_networks_are_not_asked_to_reach_each_other(host: RecordingRoot) -> None:
    nics = (replace(NICS[0], network="red", vlan=100), replace(NICS[1], network="blue", vlan=101))
    (proof,) = (proof for proof in audit(host, frames=20, nics=nics) if proof.name == "vepa")
    assert proof.verdict == Verdict.NOT_MEASURED
    assert "two guests of the same network with an address and a NIC are required" in proof.evidence[0]


def test_one_guest_cannot_send_to_another(host: RecordingRoot) -> None:
    (proof,) = (proof for proof in audit(host, GUESTS[:1], frames=20) if proof.name == "vepa")
    assert "two guests with an address and a NIC are required, 1 such guests are running" in proof.evidence[0]


@pytest.mark.parametrize("of_a_kind", [2, pytest.param(None, marks=pytest.mark.soak)])
def test_each_file_that_cannot_be_read_or_understood(host: RecordingRoot, of_a_kind: int | None) -> None:
    """Whichever file fails: the same proofs in the same order, no exception, and no failing proof starts to pass.

    Files whose names differ only in numbers are of a kind; ``of_a_kind`` of them are tried, or all.
    """
    topology = read_topology(host)
    host.registers[host.real(PF), 0x3500] = 0x8000EFEF
    host.asked.clear()
    before = verdicts(audit(host, topology=topology))
    assert before["vepa", "host"] == Verdict.FAIL
    kinds: dict[str, list[str]] = {}
    for name in sorted(host.asked):
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    assert f"proc/{GUEST1.pid}/smaps" in kinds["proc/N/smaps"]
    for name in (name for names in kinds.values() for name in names[:of_a_kind]):
        host.read_errors[name] = EACCES
        forbidden = audit(host, topology=topology)
        host.read_errors.clear()
        check(name, before, forbidden)
        if (host.path / name).is_file() and not name.endswith("pagemap"):
            content = (host.path / name).read_bytes()
            (host.path / name).write_bytes(b"\xff) garbage\n\n: 7 lo\n")
            check(name, before, audit(host, topology=topology))
            (host.path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("proc/491/task/491/stat", ("core-exclusive", "guest1")),
        ("proc/491/task/491/status", ("manager-core", "host")),
        ("proc/4944/task/4955/status", ("core-exclusive", "guest2")),
        ("proc/4944/smaps", ("memory-static", "guest1")),
        ("proc/4944/numa_maps", ("memory-static", "guest1")),
        ("proc/4944/status", ("memory-static", "host")),
        ("proc/4944/smaps", ("device-isolated", "guest1")),
        ("proc/4944/attr/current", ("qemu-confined", "guest1")),
        ("proc/4944/task/4955/status", ("qemu-confined", "guest1")),
        ("sys/kernel/mm/ksm/run", ("memory-static", "guest2")),
        ("sys/kernel/iommu_groups/9/type", ("device-isolated", "guest1")),
        ("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", ("device-isolated", "guest2")),
    ],
)
@pytest.mark.parametrize("how", ["forbidden", "garbage", "empty"])
def test_proof_never_passes_without_what_it_rests_on(host: RecordingRoot, name: str, key: tuple[str, str], how: str) -> None:
    topology = read_topology(host)
    if how == "forbidden":
        host.read_errors[name] = EACCES
    else:
        (host.path / name).write_text("7 ) garbage\n" if how == "garbage" else "")
    assert verdicts(audit(host, topology=topology))[key] != Verdict.PASS


def check(name: str, before: dict[tuple[str, str], Verdict], proofs: tuple[Proof, ...]) -> None:
    assert [(proof.name, proof.subject) for proof in proofs] == keys(), name
    for key, verdict in verdicts(proofs).items():
        assert verdict != Verdict.PASS or before[key] == Verdict.PASS, f"{key} passes without {name}"


def test_unreadable_thread_prevents_only_passes_that_need_threads(host: RecordingRoot) -> None:
    """It may run anywhere. A finding about other threads still fails the proof."""
    host.read_errors[f"proc/{MANAGER}/task/{MANAGER}/stat"] = EACCES
    proofs = audit(host)
    (proof,) = [proof for proof in proofs if (proof.name, proof.subject) == ("core-exclusive", "guest1")]
    assert proof.verdict == Verdict.NOT_MEASURED
    assert f"1 threads could not be read: cannot read /proc/{MANAGER}/task/{MANAGER}/stat" in proof.evidence[0]
    assert verdicts(proofs)["memory-static", "guest1"] == Verdict.PASS
    vcpu = f"proc/{GUEST1.pid}/task/{GUEST1.vcpus[0].tid}/status"
    host.add(vcpu, host.text(vcpu).replace("Cpus_allowed_list:\t2", "Cpus_allowed_list:\t0-7"))
    assert verdicts(audit(host))["core-exclusive", "guest1"] == Verdict.FAIL


def test_an_interrupt_that_cannot_be_read_is_named(host: RecordingRoot) -> None:
    host.add("proc/irq/200/smp_affinity_list", "none")
    proofs = audit(host)
    (proof,) = [proof for proof in proofs if (proof.name, proof.subject) == ("core-exclusive", "guest1")]
    assert proof.verdict == Verdict.PASS
    assert any("interrupt 200" in line for line in proof.evidence)


def test_a_guest_that_libvirt_cannot_describe_is_not_measured(host: RecordingRoot) -> None:
    proofs = audit(host, unread={"odd": "internal error"})
    assert (proofs[0].subject, proofs[0].verdict, proofs[0].evidence) == ("odd", Verdict.NOT_MEASURED, ("internal error",))
    assert [(proof.name, proof.subject) for proof in proofs[1:]] == keys()


def test_kernel_command_line_is_checked(host: RecordingRoot) -> None:
    host.add("proc/cmdline", "quiet pcie_acs_override=downstream")
    assert verdicts(audit(host))["device-isolated", "guest1"] == Verdict.FAIL


def test_exits_are_counted_before_frames_are_sent(host: RecordingRoot) -> None:
    done = []

    def exits(uuid: UUID) -> tuple[Mapping[str, int], ...]:
        done.append("exits")
        return read_exits(uuid)

    def send(*_: object) -> str:
        done.append("frames")
        return ""

    audit(host, exits=exits, send=send, frames=20)
    assert done == ["exits"] * 2 * len(GUESTS) + ["frames"]


def test_summary_passes_only_if_every_proof_passed(host: RecordingRoot) -> None:
    proofs = audit(host)
    assert summarize(proofs) == Verdict.FAIL
    assert summarize(proof for proof in proofs if proof.name != "vepa") == Verdict.PASS
