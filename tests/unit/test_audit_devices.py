"""device-isolated and devices-minimal: they pass on what a real guest has, and fail for each way to break them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.audit.devices import ALLOWED_DEVICES, DeviceState, Translation, prove_device_isolated, prove_devices_minimal
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import WEAKER, Proof, Verdict
from orchestrator.model.topology import IommuGroup
from orchestrator.values import PciAddress
from tests.harness.audit_data import GUEST1, GUESTS, load_threads

VF = GUEST1.hostdevs[0]
STATE = DeviceState(VF, "vfio-pci", IommuGroup(11, "DMA", (VF,)), False, "dmar0", True, "/dev/vfio/11")
TRANSLATED = Translation(128, 0)


def isolated(
    state: DeviceState, translation: Translation | None = TRANSLATED, unsafe: str | None = "N", cmdline: str = "quiet"
) -> Proof:
    return prove_device_isolated(GUEST1, (state,), translation, unsafe, cmdline)


def test_isolated_device_passes() -> None:
    proof = isolated(STATE)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert "128 of 128 guest pages looked up (/proc/4944/pagemap) lie at another address on the host" in proof.evidence[-1]


@pytest.mark.parametrize("kind", ["DMA", "DMA-FQ", "unmanaged"])
def test_translating_group_types_pass(kind: str) -> None:
    assert isolated(replace(STATE, group=IommuGroup(11, kind, (VF,)))).verdict == Verdict.PASS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"driver": "igbvf"}, "its driver is igbvf"),
        ({"driver": None}, "its driver is none"),
        ({"held": None}, "does not have its VFIO file open"),
        ({"group": None}, "in no IOMMU group"),
        ({"group": IommuGroup(11, "DMA", (VF, PciAddress.parse("0000:41:10.6")))}, "shares IOMMU group 11 with 0000:41:10.6"),
        ({"group": IommuGroup(11, "DMA", ())}, "does not list it"),
        ({"group": IommuGroup(11, "new", (VF,))}, "of type 'new', which we do not know"),
        ({"noiommu": True}, "without an IOMMU"),
        ({"unit": None}, "no IOMMU lists it"),
        ({"listed": False}, "no IOMMU lists it"),
        ({"physical": True}, "it is a physical function: who has it controls its VFs"),
    ],
)
def test_device_that_is_not_isolated_fails(changes: dict[str, object], message: str) -> None:
    proof = isolated(replace(STATE, **changes))  # type: ignore[arg-type]
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert message in proof.evidence[0]


PASSED_THROUGH = replace(STATE, group=IommuGroup(11, "identity", (VF,)))


def test_a_default_domain_that_passes_through_limits_the_proof() -> None:
    """iommu=pt: the type is that of the time without a guest; what VFIO attaches translates, and that is what was measured."""
    proof = isolated(PASSED_THROUGH)
    assert proof.verdict == Verdict.PASS
    (limit,) = [line for line in proof.evidence if line.startswith(WEAKER)]
    assert f"while no guest holds {VF}, its DMA is not translated" in limit
    assert not any("passes through untranslated" in line for line in proof.evidence)


def test_a_default_domain_that_passes_through_hides_no_fault() -> None:
    assert isolated(PASSED_THROUGH, Translation(128, 128)).verdict == Verdict.FAIL
    assert isolated(PASSED_THROUGH, None).verdict == Verdict.NOT_MEASURED
    assert isolated(replace(PASSED_THROUGH, held=None)).verdict == Verdict.FAIL


@pytest.mark.parametrize(
    "word", ["pcie_acs_override=downstream,multifunction", "pcie-acs-override=id:8086:10c9", "intremap=on,nosid"]
)
def test_words_that_make_groups_look_isolated_fail(word: str) -> None:
    proof = isolated(STATE, cmdline=f"root=/dev/vda {word} quiet")
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert f"{word} is on the kernel command line" in proof.evidence[0]


@pytest.mark.parametrize("cmdline", ["", "intremap=on iommu=pt", "my_pcie_acs_override_x=1", "quiet -- pcie_acs_override=x"])
def test_other_words_do_not(cmdline: str) -> None:
    assert isolated(STATE, cmdline=cmdline).verdict == Verdict.PASS


def test_untranslated_dma_fails() -> None:
    """Host physical address = guest physical address for every page: DMA would work without any IOMMU."""
    assert isolated(STATE, Translation(128, 128)).verdict == Verdict.FAIL


def test_unknown_translation_is_not_measured_but_faults_still_fail() -> None:
    assert isolated(STATE, None).verdict == Verdict.NOT_MEASURED
    assert isolated(STATE, Translation(0, 0)).verdict == Verdict.NOT_MEASURED
    assert isolated(replace(STATE, driver=None), None).verdict == Verdict.FAIL


def test_missing_interrupt_remapping_fails() -> None:
    assert isolated(STATE, unsafe="Y").verdict == Verdict.FAIL
    assert isolated(STATE, unsafe=None).verdict == Verdict.PASS


def test_guest_without_devices_is_not_measured() -> None:
    assert prove_device_isolated(GUEST1, (), TRANSLATED, "N").verdict == Verdict.NOT_MEASURED


def minimal(guest: RunningGuest) -> Proof:
    threads = tuple(thread for thread in load_threads() if not thread.name.startswith("kvm-pit"))
    return prove_devices_minimal(guest, threads)


def test_minimal_guests_pass() -> None:
    for guest in GUESTS:
        proof = minimal(guest)
        assert (proof.verdict, proof.figure) == (Verdict.PASS, 0), proof.evidence
        assert any(line.startswith("1 x isa-serial: ") for line in proof.evidence)


@pytest.mark.parametrize(
    "device",
    [
        "VGA",
        "virtio-balloon-pci",
        "usb-tablet",
        "ich9-ahci",
        "smbus-eeprom",
        "kvm-pit",
        "kvm-i8259",
        "pcie-root-port",
        "virtio-net-pci",
    ],
)
def test_device_beyond_the_list_fails(device: str) -> None:
    proof = minimal(replace(GUEST1, devices=(*GUEST1.devices, device, device)))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert proof.evidence[0] == f"2 x {device}: 0 allowed"


@pytest.mark.parametrize("device", ALLOWED_DEVICES)
def test_one_more_of_an_allowed_device_fails(device: str) -> None:
    count = ALLOWED_DEVICES[device].count
    assert minimal(replace(GUEST1, devices=("vfio-pci", *[device] * count))).verdict == Verdict.PASS
    assert minimal(replace(GUEST1, devices=("vfio-pci", *[device] * (count + 1)))).verdict == Verdict.FAIL


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_vfio_devices_that_nobody_passed_through_fail(change: str) -> None:
    devices = (*GUEST1.devices, "vfio-pci") if change == "one more" else tuple(set(GUEST1.devices) - {"vfio-pci"})
    assert minimal(replace(GUEST1, devices=devices)).verdict == Verdict.FAIL


def test_timer_thread_of_kvm_fails_though_the_tree_does_not_show_it() -> None:
    assert [thread.name for thread in load_threads() if thread.name == f"kvm-pit/{GUEST1.pid}"]
    proof = prove_devices_minimal(GUEST1, load_threads())
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)


def test_empty_device_tree_is_not_measured() -> None:
    assert minimal(replace(GUEST1, devices=())).verdict == Verdict.NOT_MEASURED


def test_every_allowed_device_has_a_reason_of_its_own() -> None:
    assert len({allowance.reason for allowance in ALLOWED_DEVICES.values()}) == len(ALLOWED_DEVICES)
    assert all(len(allowance.reason) > 20 for allowance in ALLOWED_DEVICES.values())
