"""devices-minimal: QEMU emulates only the devices of a short list. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.audit.edge import TAP_PREFIX
from orchestrator.host.pci import VFIO
from orchestrator.host.processes import Thread
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.model.proof import WEAKER, Measurement, count_findings, not_measured
from orchestrator.model.waiver import Waiver


@dataclass(frozen=True)
class Allowance:
    """Number of devices of a model that a guest may have."""

    count: int
    reason: str


ALLOWED_DEVICES: Mapping[str, Allowance] = {
    "q35-pcihost": Allowance(1, "the PCI host bridge: without PCI there is no bus for the virtual function"),
    "mch": Allowance(1, "the host bridge's own PCI function, part of q35"),
    "ICH9-LPC": Allowance(1, "ACPI of q35: power-off and the guest's interrupt routing; QEMU has no option to omit it"),
    "isa-serial": Allowance(1, "the console: the only channel between guest and manager"),
    "fw_cfg_io": Allowance(1, "passes kernel, initramfs and command line; not used after the guest has booted"),
    "kvm-ioapic": Allowance(1, "the interrupt controller for the console and ACPI, inside KVM"),
    "kvmclock": Allowance(1, "the guest's clock: without it each reading of the time is an exit"),
    "mc146818rtc": Allowance(1, "the time of day, read once while the guest boots; QEMU has no option to omit it"),
    "i8257": Allowance(2, "legacy DMA controllers, which Linux does not use; QEMU has no option to omit them"),
}
"""By QEMU's name of the device model. Other models are findings, except ``vfio-pci``: the guest's own hardware."""


_DISK_MODELS = ("virtio-blk-pci", "virtio-blk-device")
"""One of each per emulated disk, which the request or the host's policy has accepted."""
_NIC_MODELS = ("virtio-net-pci", "virtio-net-device")
"""One of each per NIC of a software edge."""


def prove_devices_minimal(guest: RunningGuest, threads: tuple[Thread, ...], given: tuple[str, ...] = ()) -> Measurement:
    """QEMU has only listed devices and the passed-through ones.

    Args:
        threads: all of the host.
        given: texts that the guest was configured with, by the manager's record, without their contents.
    """
    if not guest.devices:
        return not_measured("QEMU's device tree is empty (HMP `info qtree`)")
    counts = Counter(guest.devices)
    allowed = {model: allowance.count for model, allowance in ALLOWED_DEVICES.items()}
    allowed |= dict.fromkeys(_DISK_MODELS, len(guest.disks))
    allowed |= dict.fromkeys(_NIC_MODELS, sum(nic.interface.startswith(TAP_PREFIX) for nic in guest.nics))
    findings = [
        f"{count} x {model}: {allowed.get(model, 0)} allowed"
        for model, count in sorted(counts.items())
        if model != VFIO and count > allowed.get(model, 0)
    ]
    if counts[VFIO] != len(guest.hostdevs):
        findings.append(f"QEMU has {counts[VFIO]} {VFIO} devices, libvirt passed {len(guest.hostdevs)} through")
    # KVM's timer chip has a kernel thread of its own (arch/x86/kvm/i8254.c), which can run on a guest's core.
    if "kvm-pit" not in counts and any(thread.kernel and thread.name == f"kvm-pit/{guest.pid}" for thread in threads):
        findings.append(f"a kernel thread kvm-pit/{guest.pid} runs: KVM emulates a timer chip")
    evidence = [
        f"{counts[model]} x {model}: {ALLOWED_DEVICES[model].reason}" for model in sorted(counts.keys() & ALLOWED_DEVICES)
    ]
    evidence.append(f"{counts[VFIO]} x {VFIO}: the guest's own hardware, not emulated")
    evidence += [f"{WEAKER}{counts[model]} x {model}: {Waiver.EMULATED_DISK.reason}" for model in _DISK_MODELS if counts[model]]
    evidence += [f"{WEAKER}{counts[model]} x {model}: {Waiver.SOFTWARE_EDGE.reason}" for model in _NIC_MODELS if counts[model]]
    evidence += [f"{text} was given in the guest's own initrd, without a device (the manager's record)" for text in given]
    return count_findings(findings, evidence)
