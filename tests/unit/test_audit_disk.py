"""disk-isolated and disk-clean pass on a guest's own disk, and fail for each way to break them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.audit.disk import DiskState, prove_disk_clean, prove_disk_isolated
from orchestrator.audit.facts import Source
from orchestrator.audit.isolation import prove_devices_minimal
from orchestrator.audit.report import Auditor
from orchestrator.host.survey import read_topology
from orchestrator.model.access import OPERATOR
from orchestrator.model.disk import DiskCheck
from orchestrator.model.exits import ExitPolicy
from orchestrator.model.plan import Plan
from orchestrator.model.proof import WEAKER, Measurement, Proof, Verdict
from orchestrator.model.topology import IommuGroup
from orchestrator.values import PciAddress
from tests.fakes.root import DEVICES
from tests.harness.audit_data import GUEST1
from tests.harness.crash import World
from tests.harness.guests import create, open_manager

ADDRESS = PciAddress.parse("0000:44:00.0")
FILE = "/var/lib/nohype/disks/g1-1.raw"
STATE = DiskState(ADDRESS, "vfio-pci", IommuGroup(20, "DMA", (ADDRESS,)), (), "/dev/vfio/20")
CHECK = DiskCheck("nohype-disk0", ADDRESS, "2026-11-26T10:00:00.000+00:00", "format", 1 << 26, 1 << 26, "ab" * 32)
EMULATED = replace(GUEST1, disks=(FILE,))
NQN = "nqn.2026-11.example:disk1"
REMOTE = replace(GUEST1, targets=(f"nvme-tcp://10.9.0.100:4420/{NQN}",))
NOT_CONNECTED: frozenset[str] = frozenset()


def clean(*checks: DiskCheck) -> Measurement:
    return prove_disk_clean(GUEST1, (ADDRESS,), checks)


def test_passed_through_disk_passes() -> None:
    proof = prove_disk_isolated(GUEST1, (STATE,), NOT_CONNECTED)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert proof.evidence == (
        "0000:44:00.0: driver vfio-pci, alone in IOMMU group 20, no block device on the host, QEMU has /dev/vfio/20 open",
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"driver": "nvme"}, "its driver is nvme, expected vfio-pci"),
        ({"driver": None}, "its driver is none"),
        ({"vfio_file": None}, "QEMU does not hold the controller's VFIO file"),
        ({"group": None}, "it is in no IOMMU group"),
        (
            {"group": IommuGroup(20, "DMA", (ADDRESS, PciAddress.parse("0000:45:00.0")))},
            "shares IOMMU group 20 with 0000:45:00.0",
        ),
        ({"group": IommuGroup(20, "DMA", ())}, "shares IOMMU group 20 with unknown devices"),
        ({"blocks": ("nvme0n1",)}, "the host has block devices of it: nvme0n1"),
    ],
)
def test_path_of_the_host_to_the_disk_fails(changes: dict[str, object], says: str) -> None:
    proof = prove_disk_isolated(GUEST1, (replace(STATE, **changes),), NOT_CONNECTED)  # type: ignore[arg-type]
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert says in proof.evidence[0]


def test_emulated_disk_is_weaker() -> None:
    proof = prove_disk_isolated(EMULATED, (), NOT_CONNECTED)
    assert proof.verdict == Verdict.PASS
    assert proof.evidence[0].startswith(f"{WEAKER}disk {FILE}: QEMU emulates the disk")
    models = (*GUEST1.devices, "virtio-blk-pci", "virtio-blk-device")
    minimal = prove_devices_minimal(replace(EMULATED, devices=models), ())
    assert minimal.verdict == Verdict.PASS
    assert sum(line.startswith(WEAKER) for line in minimal.evidence) == 2
    assert prove_devices_minimal(replace(GUEST1, devices=models), ()).verdict == Verdict.FAIL


def test_verified_disk_passes_with_its_evidence() -> None:
    proof = clean(CHECK)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert proof.evidence[0] == (
        f"disk nohype-disk0 (0000:44:00.0): 67108864 bytes read as zero at {CHECK.time} (method format);"
        " then image abababababab was written and read back"
    )
    assert proof.evidence[-1].startswith(WEAKER)


@pytest.mark.parametrize(
    ("checks", "says"),
    [
        ((), "it was not verified before the guest got it"),
        ((replace(CHECK, address=PciAddress.parse("0000:45:00.0")),), "it was not verified"),
        ((replace(CHECK, read=CHECK.size - 512),), "67108352 of 67108864 bytes were read"),
        ((replace(CHECK, read=0, size=0),), "0 of 0 bytes were read"),
    ],
)
def test_disk_that_was_not_verified_fails(checks: tuple[DiskCheck, ...], says: str) -> None:
    proof = clean(*checks)
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert says in proof.evidence[0]


def test_one_of_two_disks_that_was_not_verified_fails() -> None:
    assert prove_disk_clean(GUEST1, (ADDRESS, PciAddress.parse("0000:45:00.0")), (CHECK,)).figure == 1


def test_file_that_was_not_verified_fails() -> None:
    check = DiskCheck(FILE, None, CHECK.time, "new file", 1 << 20, 1 << 20)
    assert prove_disk_clean(EMULATED, (), (check,)).verdict == Verdict.PASS
    assert prove_disk_clean(EMULATED, (), ()).verdict == Verdict.FAIL


def test_unmanaged_guest_is_not_measured() -> None:
    assert prove_disk_clean(GUEST1, (ADDRESS,), None).verdict == Verdict.NOT_MEASURED


class TestAudit:
    """The audit of a fake host with a guest that has a disk, and one that has none."""

    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        return World(tmp_path / "world")

    def measure(self, world: World, *, forget: bool = False) -> tuple[dict[tuple[str, str], Proof], Plan]:
        manager = open_manager(world)
        known = {guest.plan.name for guest in manager.guests(OPERATOR)}
        plan = manager.guest(OPERATOR, "web").plan if "web" in known else create(manager, disks=[{}])
        if "bare" not in known:
            create(manager, name="bare")
        source = Source(
            world.host, world.hypervisor, lambda: read_topology(world.host), lambda *_: "", world.server.policy.housekeeping,
            ExitPolicy(1, 1), window=0, disk_checks=(lambda _: ()) if forget else manager.records.disk_checks,
        )  # fmt: skip
        return {(proof.name, proof.subject): proof for proof in Auditor(source).run()}, plan

    def test_guest_with_a_disk_and_guest_without_one(self, world: World) -> None:
        proofs, plan = self.measure(world)
        assert proofs["disk-clean", "web"].verdict == Verdict.PASS, proofs["disk-clean", "web"].evidence
        assert f"({plan.disks[0].address})" in proofs["disk-clean", "web"].evidence[0]
        # The fake has no open files of QEMU: the proof says so, and everything else about the disk is right.
        assert proofs["disk-isolated", "web"].verdict != Verdict.PASS
        for name in ("disk-isolated", "disk-clean"):
            assert proofs[name, "bare"].verdict == Verdict.PASS
            assert proofs[name, "bare"].evidence == ("the guest has no disk: its root file system is in memory",)

    def test_unverified_disk_fails(self, world: World) -> None:
        assert self.measure(world, forget=True)[0]["disk-clean", "web"].verdict == Verdict.FAIL

    def test_unreadable_device_is_not_measured(self, world: World) -> None:
        address = self.measure(world)[1].disks[0].address
        world.host.read_errors[f"{DEVICES}/{address}/class"] = 5
        proofs, _ = self.measure(world)
        assert proofs["disk-clean", "web"].verdict == Verdict.NOT_MEASURED


def test_network_disk_is_not_measured() -> None:
    proof = prove_disk_isolated(REMOTE, (), frozenset({"nqn.2026-11.example:disk2"}))
    assert (proof.verdict, proof.figure) == (Verdict.NOT_MEASURED, None)
    assert proof.evidence[0].startswith(f"{REMOTE.targets[0]}: the guest connects to it over its VF")
    proof = prove_disk_clean(REMOTE, (), ())
    assert (proof.verdict, proof.figure) == (Verdict.NOT_MEASURED, None)
    assert "was not read before the guest got it" in proof.evidence[0]


def test_network_disk_to_which_the_host_is_connected_fails() -> None:
    proof = prove_disk_isolated(REMOTE, (), frozenset({NQN}))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert proof.evidence == (f"{REMOTE.targets[0]}: the host is connected to it too",)


def test_failure_of_a_controller_is_not_hidden_by_a_network_disk() -> None:
    assert prove_disk_isolated(REMOTE, (replace(STATE, driver="nvme"),), NOT_CONNECTED).verdict is Verdict.FAIL
    assert prove_disk_clean(REMOTE, (ADDRESS,), ()).verdict is Verdict.FAIL
    assert prove_disk_isolated(REMOTE, (STATE,), NOT_CONNECTED).verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize("text", ["", "anything", "nvme-tcp://x", f"nvme-tcp://10.9.0.1/{NQN}"])
def test_target_of_an_unmanaged_guest_can_be_any_text(text: str) -> None:
    guest = replace(GUEST1, targets=(text,))
    assert prove_disk_isolated(guest, (), NOT_CONNECTED).verdict is Verdict.NOT_MEASURED
    assert prove_disk_isolated(guest, (), frozenset({NQN})).verdict is (Verdict.FAIL if NQN in text else Verdict.NOT_MEASURED)
