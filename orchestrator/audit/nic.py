"""device-isolated: passed-through devices reach only the memory of their guest, through the IOMMU. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.host.cmdline import find_unsafe_words
from orchestrator.host.pci import VFIO
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import WEAKER, Measurement, count_findings, not_measured
from orchestrator.model.topology import IommuGroup
from orchestrator.model.waiver import Waiver
from orchestrator.values import PciAddress

# drivers/iommu/iommu.c, iommu_group_show_type(): the default domain, which the group has while no guest uses it. VFIO always
# attaches one that translates (drivers/vfio/vfio_iommu_type1.c, vfio_iommu_type1_attach_group).
_TRANSLATING = ("DMA", "DMA-FQ", "unmanaged", "blocked")
_IDENTITY = "identity"


@dataclass(frozen=True)
class DeviceState:
    """A passed-through PCI function, as the host's kernel reports it."""

    address: PciAddress
    driver: str | None
    group: IommuGroup | None
    noiommu: bool  # VFIO made the group without an IOMMU (vfio.enable_unsafe_noiommu_mode)
    unit: str | None  # the IOMMU that translates for it, such as dmar0, by the device's own link
    listed: bool  # that IOMMU lists the device (/sys/class/iommu/UNIT/devices)
    vfio_file: str | None  # the VFIO file of this device that the guest's QEMU has open
    physical: bool = False  # an SR-IOV physical function, which controls all of its VFs


@dataclass(frozen=True)
class Translation:
    """Guest pages whose host physical address was read."""

    sampled: int
    identical: int  # pages with the same address in the guest and on the host


def prove_device_isolated(
    guest: RunningGuest,
    devices: tuple[DeviceState, ...],
    translation: Translation | None,
    unsafe_interrupts: str | None,
    cmdline: str = "",
    *,
    iommu: bool = True,
) -> Measurement:
    """Each device is behind the IOMMU, and its DMA is translated.

    Args:
        translation: None if the guest addresses of the pages are not known.
        unsafe_interrupts: vfio_iommu_type1.allow_unsafe_interrupts, None if the module is not loaded.
        iommu: the host uses an IOMMU.
    """
    if not devices:
        weaker = "" if iommu else f"; {WEAKER}{Waiver.NO_IOMMU.reason}"
        return not_measured(f"no device is passed through to this guest{weaker}")
    findings = [f"{device.address}: {finding}" for device in devices for finding in _check_device(device)]
    if unsafe_interrupts not in (None, "N"):
        findings.append(f"VFIO may run without interrupt remapping: allow_unsafe_interrupts is {unsafe_interrupts}")
    if translation and translation.sampled and translation.identical == translation.sampled:
        findings.append("DMA is not translated: all sampled pages have equal guest and host addresses")
    findings += [f"{word} is on the kernel command line: {why}" for word, why in find_unsafe_words(cmdline)]
    if not findings and (not translation or not translation.sampled):
        return not_measured("the host addresses of the guest's pages could not be read, so translation of DMA was not measured")
    evidence = [_describe_device(device) for device in devices]
    evidence += [
        f"{WEAKER}while no guest uses {device.address}, its DMA is not translated: IOMMU group {device.group.number} has a"
        f" default domain of type {_IDENTITY} (iommu=pt); this proof holds only while the guest uses the device"
        for device in devices
        if device.group and device.group.type == _IDENTITY
    ]
    evidence.append(f"vfio_iommu_type1.allow_unsafe_interrupts is {unsafe_interrupts or 'absent'}")
    if translation and translation.sampled:
        differing = translation.sampled - translation.identical
        evidence.append(
            f"{differing} of {translation.sampled} sampled guest pages have other host addresses (/proc/{guest.pid}/pagemap):"
            " working DMA was translated"
        )
    return count_findings(findings, evidence)


def _check_device(device: DeviceState) -> list[str]:
    findings = []
    if device.physical:
        findings.append("the device is a physical function, which controls all of its VFs")
    if device.driver != VFIO:
        findings.append(f"its driver is {device.driver or 'none'}, expected {VFIO}")
    if device.vfio_file is None:
        findings.append("QEMU does not hold the device's VFIO file")
    if device.group is None:
        return [*findings, "the device is not in an IOMMU group"]
    others = [str(member) for member in device.group.devices if member != device.address]
    if others:
        findings.append(f"it shares IOMMU group {device.group.number} with {', '.join(others)}")
    if device.address not in device.group.devices:
        findings.append(f"IOMMU group {device.group.number} does not list it")
    if device.group.type not in (*_TRANSLATING, _IDENTITY):
        findings.append(f"IOMMU group {device.group.number} has unknown type {device.group.type!r}")
    if device.noiommu:
        findings.append("VFIO drives it without an IOMMU (vfio-noiommu)")
    if device.unit is None or not device.listed:
        findings.append("no IOMMU lists it among its devices (/sys/class/iommu)")
    return findings


def _describe_device(device: DeviceState) -> str:
    group = f"alone in IOMMU group {device.group.number} of type {device.group.type}" if device.group else "in no IOMMU group"
    if device.group and len(device.group.devices) != 1:
        group = f"in IOMMU group {device.group.number} with {len(device.group.devices)} devices, type {device.group.type}"
    return f"{device.address}: driver {device.driver}, {group}, IOMMU {device.unit}, QEMU has {device.vfio_file} open"
