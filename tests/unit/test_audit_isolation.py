"""devices-minimal passes on the devices of real guests, and fails for each device beyond the list."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.audit.isolation import ALLOWED_DEVICES, prove_devices_minimal
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import Measurement, Verdict
from tests.harness.audit_data import GUEST1, GUESTS, load_threads


def minimal(guest: RunningGuest) -> Measurement:
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
def test_unlisted_device_fails(device: str) -> None:
    proof = minimal(replace(GUEST1, devices=(*GUEST1.devices, device, device)))
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert proof.evidence[0] == f"2 x {device}: 0 allowed"


@pytest.mark.parametrize("device", ALLOWED_DEVICES)
def test_one_more_of_an_allowed_device_fails(device: str) -> None:
    count = ALLOWED_DEVICES[device].count
    assert minimal(replace(GUEST1, devices=("vfio-pci", *[device] * count))).verdict == Verdict.PASS
    assert minimal(replace(GUEST1, devices=("vfio-pci", *[device] * (count + 1)))).verdict == Verdict.FAIL


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_vfio_device_count_unlike_libvirts_fails(change: str) -> None:
    devices = (*GUEST1.devices, "vfio-pci") if change == "one more" else tuple(set(GUEST1.devices) - {"vfio-pci"})
    assert minimal(replace(GUEST1, devices=devices)).verdict == Verdict.FAIL


def test_kvm_timer_thread_fails_without_a_device_in_the_tree() -> None:
    assert [thread.name for thread in load_threads() if thread.name == f"kvm-pit/{GUEST1.pid}"]
    proof = prove_devices_minimal(GUEST1, load_threads())
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)


def test_empty_device_tree_is_not_measured() -> None:
    assert minimal(replace(GUEST1, devices=())).verdict == Verdict.NOT_MEASURED


def test_every_allowed_device_has_a_reason_of_its_own() -> None:
    assert len({allowance.reason for allowance in ALLOWED_DEVICES.values()}) == len(ALLOWED_DEVICES)
    assert all(len(allowance.reason) > 20 for allowance in ALLOWED_DEVICES.values())


def test_given_text_is_named_and_no_device() -> None:
    threads = tuple(thread for thread in load_threads() if not thread.name.startswith("kvm-pit"))
    proof = prove_devices_minimal(GUEST1, threads, ("user_data (sha256 0123abcd, 512 bytes)",))
    assert proof.verdict == Verdict.PASS
    assert proof.evidence[-1].startswith("user_data (sha256 0123abcd, 512 bytes) was given in the guest's own initrd")
