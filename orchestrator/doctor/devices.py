"""Checks of devices: IOMMU, its groups, VFIO, and functions that guests can get."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.host.cmdline import find_unsafe_words
from orchestrator.host.iommu import is_without_iommu, read_unsafe_interrupts
from orchestrator.host.pci import VFIO
from orchestrator.host.processor import has_remapped_interrupts
from orchestrator.values import PciAddress

_FIRMWARE = "enable AMD-Vi or VT-d in the firmware settings, and on Intel add `intel_iommu=on` to the kernel's command line"


def _check_iommu(facts: Facts) -> Finding:
    every = facts.topology.iommu_groups
    groups = [group for group in every if not is_without_iommu(facts.host, group.number)]
    if not groups:
        found = f"{len(every)} groups of functions that VFIO drives without an IOMMU" if every else "no IOMMU groups"
        return failed(found, "an IOMMU that the kernel uses", _FIRMWARE)
    return passed(f"{len(groups)} IOMMU groups")


def _check_interrupts(facts: Facts) -> Finding:
    needed = "interrupt remapping: a guest's device cannot send interrupts to other CPUs"
    if read_unsafe_interrupts(facts.host) in ("Y", "1"):
        remedy = "remove allow_unsafe_interrupts from the options of vfio_iommu_type1 in /etc/modprobe.d"
        return failed("VFIO was told to do without it (allow_unsafe_interrupts)", needed, remedy)
    if not facts.topology.iommu_groups:
        return failed("without an IOMMU there is none", needed, _FIRMWARE)
    if not has_remapped_interrupts(facts.host):
        return failed("no interrupt has a remapping chip (IR-)", needed, "enable x2APIC in the firmware settings")
    return passed("interrupts have remapping chips (IR-)")


def _check_overrides(facts: Facts) -> Finding:
    if found := find_unsafe_words(facts.topology.cmdline):
        text = "; ".join(f"{word}: {why}" for word, why in found)
        return failed(
            text,
            "IOMMU groups as the hardware isolates",
            f"remove {', '.join(word for word, _ in found)} from the kernel's command line",
        )
    return passed("no boot parameter weakens the IOMMU")


def _find_faults(facts: Facts, address: PciAddress) -> Iterator[str]:
    """Why the IOMMU does not isolate a function."""
    group = facts.topology.group_of.get(address)
    if group is None:
        yield f"{address} has no IOMMU group"
        return
    if others := ", ".join(str(other) for other in group.devices if other != address):
        yield f"{address} shares IOMMU group {group.number} with {others}"
    if is_without_iommu(facts.host, group.number):
        yield f"VFIO drives {address} without an IOMMU (vfio-noiommu)"
    if group.type == "identity":
        yield f"IOMMU group {group.number} of {address} is not translated (identity)"


def _check_groups(facts: Facts) -> Finding:
    functions = [vf.address for pf in facts.topology.pfs for vf in pf.vfs]
    needed = "each VF alone in its IOMMU group, with translated DMA"
    if not functions:
        remedy = "create VFs (`echo 2 > /sys/class/net/NAME/device/sriov_numvfs`), and run this again"
        return not_measured("there are no VFs yet", needed, remedy)
    if wrong := [fault for address in functions for fault in _find_faults(facts, address)]:
        remedy = "move the card to a slot below a root port with ACS; remove iommu=pt from the kernel's command line"
        return failed("; ".join(wrong), needed, remedy)
    return passed(f"each of {len(functions)} VFs is alone in its group")


def _check_vfio(facts: Facts) -> Finding:
    if facts.topology.vfio:
        return passed(f"{VFIO} is loaded")
    return failed(f"{VFIO} is not loaded", f"the driver {VFIO}", f"run `modprobe {VFIO}`, and add it to /etc/modules-load.d")


def _check_disks(facts: Facts) -> Finding:
    """Only what the survey tells: uses of a disk are examined when a guest requests it."""
    found = facts.topology.controllers
    needed = "an NVMe controller of its own for each guest that needs a disk"
    remedy = "guests can use network disks or logical volumes"
    if not found:
        return failed("no NVMe controllers", needed, remedy)
    faults = {one.address: [*filter(None, [one.fault]), *_find_faults(facts, one.address)] for one in found}
    wrong = "; ".join(text for texts in faults.values() for text in texts)
    if all(faults.values()):
        return failed(wrong, needed, remedy)
    text = f"{len(found)} NVMe controllers, one of which may be the server's own"
    return passed(f"{text}; {wrong}" if wrong else text)


_D = Principle.DEVICES
CHECKS = (
    Check("iommu", _D, "the kernel uses an IOMMU", "IOMMU groups in sysfs", _check_iommu),
    Check(
        "interrupt-remapping",
        _D,
        "the IOMMU remaps interrupts",
        "chips of interrupts, allow_unsafe_interrupts of vfio_iommu_type1",
        _check_interrupts,
    ),
    Check("iommu-overrides", _D, "no boot parameter weakens the IOMMU", "the kernel's command line", _check_overrides),
    Check(
        "iommu-groups",
        _D,
        "each VF is alone in its group",
        "groups of existing VFs",
        _check_groups,
    ),
    Check("vfio", _D, "the driver vfio-pci is there", "drivers in sysfs", _check_vfio),
    Check("disks", _D, "there are disks for guests", "NVMe controllers and their groups in sysfs", _check_disks, required=False),
)
