"""device-isolated passes on the devices of a real guest, and fails for each way to break it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.audit.nic import DeviceState, Translation, prove_device_isolated
from orchestrator.model.proof import WEAKER, Measurement, Verdict
from orchestrator.model.topology import IommuGroup
from orchestrator.values import PciAddress
from tests.harness.audit_data import GUEST1

VF = GUEST1.hostdevs[0]
STATE = DeviceState(VF, "vfio-pci", IommuGroup(11, "DMA", (VF,)), False, "dmar0", True, "/dev/vfio/11")
TRANSLATED = Translation(128, 0)


def isolated(
    state: DeviceState, translation: Translation | None = TRANSLATED, unsafe: str | None = "N", cmdline: str = "quiet"
) -> Measurement:
    return prove_device_isolated(GUEST1, (state,), translation, unsafe, cmdline)


def test_isolated_device_passes() -> None:
    proof = isolated(STATE)
    assert (proof.verdict, proof.figure) == (Verdict.PASS, 0)
    assert "128 of 128 sampled guest pages have other host addresses (/proc/4944/pagemap)" in proof.evidence[-1]


@pytest.mark.parametrize("kind", ["DMA", "DMA-FQ", "unmanaged"])
def test_translating_group_types_pass(kind: str) -> None:
    assert isolated(replace(STATE, group=IommuGroup(11, kind, (VF,)))).verdict == Verdict.PASS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"driver": "igbvf"}, "its driver is igbvf"),
        ({"driver": None}, "its driver is none"),
        ({"vfio_file": None}, "QEMU does not hold the device's VFIO file"),
        ({"group": None}, "is not in an IOMMU group"),
        ({"group": IommuGroup(11, "DMA", (VF, PciAddress.parse("0000:41:10.6")))}, "shares IOMMU group 11 with 0000:41:10.6"),
        ({"group": IommuGroup(11, "DMA", ())}, "does not list it"),
        ({"group": IommuGroup(11, "new", (VF,))}, "has unknown type 'new'"),
        ({"noiommu": True}, "without an IOMMU"),
        ({"unit": None}, "no IOMMU lists it"),
        ({"listed": False}, "no IOMMU lists it"),
        ({"physical": True}, "the device is a physical function, which controls all of its VFs"),
    ],
)
def test_device_that_is_not_isolated_fails(changes: dict[str, object], message: str) -> None:
    proof = isolated(replace(STATE, **changes))  # type: ignore[arg-type]
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert message in proof.evidence[0]


PASSED_THROUGH = replace(STATE, group=IommuGroup(11, "identity", (VF,)))


def test_identity_default_domain_limits_the_proof() -> None:
    """iommu=pt: the type applies while no guest uses the device; VFIO attaches a domain that translates, which is measured."""
    proof = isolated(PASSED_THROUGH)
    assert proof.verdict == Verdict.PASS
    (limit,) = [line for line in proof.evidence if line.startswith(WEAKER)]
    assert f"while no guest uses {VF}, its DMA is not translated" in limit


def test_identity_default_domain_hides_no_finding() -> None:
    assert isolated(PASSED_THROUGH, Translation(128, 128)).verdict == Verdict.FAIL
    assert isolated(PASSED_THROUGH, None).verdict == Verdict.NOT_MEASURED
    assert isolated(replace(PASSED_THROUGH, vfio_file=None)).verdict == Verdict.FAIL


@pytest.mark.parametrize(
    "word", ["pcie_acs_override=downstream,multifunction", "pcie-acs-override=id:8086:10c9", "intremap=on,nosid"]
)
def test_kernel_options_that_fake_isolation_fail(word: str) -> None:
    proof = isolated(STATE, cmdline=f"root=/dev/vda {word} quiet")
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert f"{word} is on the kernel command line" in proof.evidence[0]


@pytest.mark.parametrize("cmdline", ["", "intremap=on iommu=pt", "my_pcie_acs_override_x=1", "quiet -- pcie_acs_override=x"])
def test_other_kernel_options_pass(cmdline: str) -> None:
    assert isolated(STATE, cmdline=cmdline).verdict == Verdict.PASS


def test_untranslated_dma_fails() -> None:
    """Host physical address = guest physical address for every page: DMA would work without any IOMMU."""
    assert isolated(STATE, Translation(128, 128)).verdict == Verdict.FAIL


def test_unknown_translation_is_not_measured_but_findings_still_fail() -> None:
    assert isolated(STATE, None).verdict == Verdict.NOT_MEASURED
    assert isolated(STATE, Translation(0, 0)).verdict == Verdict.NOT_MEASURED
    assert isolated(replace(STATE, driver=None), None).verdict == Verdict.FAIL


def test_missing_interrupt_remapping_fails() -> None:
    assert isolated(STATE, unsafe="Y").verdict == Verdict.FAIL
    assert isolated(STATE, unsafe=None).verdict == Verdict.PASS


def test_guest_without_devices_is_not_measured() -> None:
    assert prove_device_isolated(GUEST1, (), TRANSLATED, "N").verdict == Verdict.NOT_MEASURED
