"""device-isolated and devices-minimal: what a guest can reach of the host's devices, and what QEMU emulates for it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.host.cmdline import find_unsafe_words
from orchestrator.host.processes import Thread
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import WEAKER, Proof, count_faults, not_measured
from orchestrator.model.topology import IommuGroup
from orchestrator.values import PciAddress

DEVICE_ISOLATED, DEVICES_MINIMAL = "device-isolated", "devices-minimal"
ISOLATED_UNIT, MINIMAL_UNIT = "faults of isolation", "device models beyond the list"
_OWN = "vfio-pci"


@dataclass(frozen=True)
class Allowance:
    """How many devices of a model a guest may have, and why."""

    count: int
    reason: str


ALLOWED_DEVICES: Mapping[str, Allowance] = {
    "q35-pcihost": Allowance(1, "the PCI host bridge: without PCI there is no place for the virtual function"),
    "mch": Allowance(1, "the host bridge's own PCI function, part of q35"),
    "ICH9-LPC": Allowance(1, "ACPI of q35: power-off, and the guest's interrupt routing; QEMU has no switch for it"),
    "isa-serial": Allowance(1, "the console: the only channel between guest and manager"),
    "fw_cfg_io": Allowance(1, "hands over kernel, initramfs and command line; silent once the guest has booted"),
    "kvm-ioapic": Allowance(1, "the interrupt controller for the console and ACPI, inside KVM"),
    "kvmclock": Allowance(1, "the guest's clock: without it each reading of the time is an exit"),
    "mc146818rtc": Allowance(1, "the time of day, read once while the guest boots; QEMU has no switch for it"),
    "i8257": Allowance(2, "DMA controllers of old, which Linux does not use; QEMU has no switch for them"),
}
"""QEMU device model → how many are allowed, and why. What is not here is a fault; ``vfio-pci`` is the guest's own hardware."""

# drivers/iommu/iommu.c, iommu_group_show_type(): the default domain, which the group has while no guest holds it. VFIO always
# attaches one that translates (drivers/vfio/vfio_iommu_type1.c, vfio_iommu_type1_attach_group).
_TRANSLATING = ("DMA", "DMA-FQ", "unmanaged", "blocked")
_IDENTITY = "identity"


@dataclass(frozen=True)
class DeviceState:
    """A passed-through PCI function, as the host's kernel shows it.

    Attributes:
        driver: bound driver.
        group: its IOMMU group with all members.
        noiommu: whether VFIO made up the group, with nothing behind it (vfio.enable_unsafe_noiommu_mode).
        unit: the IOMMU that translates for it (``dmar0``), by the device's own link.
        listed: whether that IOMMU lists the device among its own (/sys/class/iommu/UNIT/devices).
        held: the VFIO file of this device that the guest's QEMU has open, if it has.
        physical: whether it is an SR-IOV physical function, through which its holder controls all of its VFs.
    """

    address: PciAddress
    driver: str | None
    group: IommuGroup | None
    noiommu: bool
    unit: str | None
    listed: bool
    held: str | None
    physical: bool = False


@dataclass(frozen=True)
class Translation:
    """Pages of guest memory whose host physical address was looked up.

    Attributes:
        sampled: how many were looked up.
        identical: how many lie at the same address for guest and host.
    """

    sampled: int
    identical: int


def prove_device_isolated(
    guest: RunningGuest,
    devices: tuple[DeviceState, ...],
    translation: Translation | None,
    unsafe_interrupts: str | None,
    cmdline: str = "",
) -> Proof:
    """The guest's devices reach the guest's memory only, through the IOMMU.

    Args:
        translation: None if the pages could not be looked up.
        unsafe_interrupts: /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts, None if there is none.
        cmdline: the kernel's command line.
    """
    if not devices:
        return not_measured(DEVICE_ISOLATED, guest.name, ISOLATED_UNIT, "no device is passed through to this guest")
    faults = [f"{device.address}: {fault}" for device in devices for fault in _check_device(device)]
    if unsafe_interrupts not in (None, "N"):
        faults.append(f"VFIO may go without interrupt remapping: vfio_iommu_type1.allow_unsafe_interrupts is {unsafe_interrupts}")
    if translation and translation.sampled and translation.identical == translation.sampled:
        faults.append("DMA is not translated: every page looked up has the same address for guest and host")
    faults += [f"{word} is on the kernel command line: {why}" for word, why in find_unsafe_words(cmdline)]
    evidence = [_describe_device(device) for device in devices]
    evidence += [
        f"{WEAKER}while no guest holds {device.address}, its DMA is not translated: IOMMU group {device.group.number} has a"
        f" default domain of type {_IDENTITY} (iommu=pt); what is measured here holds while the guest has it"
        for device in devices
        if device.group and device.group.type == _IDENTITY
    ]
    evidence.append(f"vfio_iommu_type1.allow_unsafe_interrupts is {unsafe_interrupts or 'absent'}")
    proof = count_faults(DEVICE_ISOLATED, guest.name, ISOLATED_UNIT, faults, evidence)
    if not translation or not translation.sampled:
        gap = "host addresses of the guest's pages could not be looked up, so translation of DMA was not measured"
        return proof if faults else not_measured(DEVICE_ISOLATED, guest.name, ISOLATED_UNIT, gap)
    differing = translation.sampled - translation.identical
    measured = (
        f"{differing} of {translation.sampled} guest pages looked up (/proc/{guest.pid}/pagemap) lie at another address on the"
        " host: DMA to a guest address that works was translated"
    )
    return count_faults(DEVICE_ISOLATED, guest.name, ISOLATED_UNIT, faults, [*evidence, measured])


def prove_devices_minimal(guest: RunningGuest, threads: tuple[Thread, ...]) -> Proof:
    """QEMU emulates nothing for the guest but what the list allows, and the guest's own devices are those passed through."""
    if not guest.devices:
        return not_measured(DEVICES_MINIMAL, guest.name, MINIMAL_UNIT, "QEMU's device tree is empty (HMP `info qtree`)")
    counts = Counter(guest.devices)

    def allowed(name: str) -> int:
        return ALLOWED_DEVICES[name].count if name in ALLOWED_DEVICES else 0

    faults = [
        f"{count} x {name}: {allowed(name)} allowed"
        for name, count in sorted(counts.items())
        if name != _OWN and count > allowed(name)
    ]
    if counts[_OWN] != len(guest.hostdevs):
        faults.append(f"QEMU has {counts[_OWN]} vfio-pci devices, libvirt passed {len(guest.hostdevs)} through")
    # KVM's timer chip has a kernel thread of its own, which peers found on their guests' cores (arch/x86/kvm/i8254.c).
    if "kvm-pit" not in counts and any(thread.kernel and thread.name == f"kvm-pit/{guest.pid}" for thread in threads):
        faults.append(f"a kernel thread kvm-pit/{guest.pid} runs: KVM emulates a timer chip")
    evidence = [f"{counts[name]} x {name}: {ALLOWED_DEVICES[name].reason}" for name in sorted(counts.keys() & ALLOWED_DEVICES)]
    evidence.append(f"{counts[_OWN]} x {_OWN}: the guest's own hardware, not emulated")
    return count_faults(DEVICES_MINIMAL, guest.name, MINIMAL_UNIT, faults, evidence)


def _check_device(device: DeviceState) -> list[str]:
    faults = []
    if device.physical:
        faults.append("it is a physical function: who has it controls its VFs")
    if device.driver != _OWN:
        faults.append(f"its driver is {device.driver or 'none'}, not {_OWN}")
    if device.held is None:
        faults.append("the guest's QEMU does not have its VFIO file open")
    if device.group is None:
        return [*faults, "it is in no IOMMU group"]
    strangers = [str(member) for member in device.group.devices if member != device.address]
    if strangers:
        faults.append(f"it shares IOMMU group {device.group.number} with {', '.join(strangers)}")
    if device.address not in device.group.devices:
        faults.append(f"IOMMU group {device.group.number} does not list it")
    if device.group.type not in (*_TRANSLATING, _IDENTITY):
        faults.append(f"IOMMU group {device.group.number} is of type {device.group.type!r}, which we do not know")
    if device.noiommu:
        faults.append("VFIO drives it without an IOMMU (vfio-noiommu)")
    if device.unit is None or not device.listed:
        faults.append("no IOMMU lists it among its devices (/sys/class/iommu)")
    return faults


def _describe_device(device: DeviceState) -> str:
    group = f"alone in IOMMU group {device.group.number} of type {device.group.type}" if device.group else "in no IOMMU group"
    if device.group and len(device.group.devices) != 1:
        group = f"in IOMMU group {device.group.number} with {len(device.group.devices)} devices, type {device.group.type}"
    return f"{device.address}: driver {device.driver}, {group}, IOMMU {device.unit}, QEMU has {device.held} open"
