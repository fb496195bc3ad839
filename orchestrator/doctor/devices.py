"""Checks of devices: IOMMU, its groups, VFIO, and functions that guests can get."""

from __future__ import annotations

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.host.cmdline import find_unsafe_words
from orchestrator.host.iommu import read_unsafe_interrupts
from orchestrator.host.pci import VFIO
from orchestrator.host.processor import has_remapped_interrupts
from orchestrator.values import PciAddress

_FIRMWARE = "enable AMD-Vi or VT-d in the firmware settings, and on Intel add `intel_iommu=on` to the kernel's command line"


def _check_iommu(facts: Facts) -> Finding:
    groups = facts.topology.iommu_groups
    if not groups:
        return failed("no IOMMU groups", "an IOMMU that the kernel uses", _FIRMWARE)
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


def _list_functions(facts: Facts) -> dict[PciAddress, str]:
    """Those that guests could get: VFs and NVMe controllers."""
    vfs = {vf.address: f"VF {vf.address}" for pf in facts.topology.pfs for vf in pf.vfs}
    return vfs | {one.address: f"NVMe controller {one.address}" for one in facts.topology.controllers}


def _check_groups(facts: Facts) -> Finding:
    functions, group_of = _list_functions(facts), facts.topology.group_of
    needed = "each function that a guest gets alone in its IOMMU group, with translated DMA"
    if not functions:
        return not_measured(
            "there are no VFs and no NVMe controllers",
            needed,
            "create VFs (`echo 2 > /sys/class/net/NAME/device/sriov_numvfs`), and run this again",
        )
    wrong = []
    for address, name in functions.items():
        group = group_of.get(address)
        if group is None:
            wrong.append(f"{name} has no IOMMU group")
        elif len(group.devices) > 1:
            others = ", ".join(str(other) for other in group.devices if other != address)
            wrong.append(f"{name} shares IOMMU group {group.number} with {others}")
        elif group.type == "identity":
            wrong.append(f"IOMMU group {group.number} of {name} is not translated (identity)")
    if wrong:
        remedy = "move the card to a slot below a root port with ACS; remove iommu=pt from the kernel's command line"
        return failed("; ".join(wrong), needed, remedy)
    return passed(f"each of {len(functions)} functions is alone in its group")


def _check_vfio(facts: Facts) -> Finding:
    if facts.topology.vfio:
        return passed(f"{VFIO} is loaded")
    return failed(f"{VFIO} is not loaded", f"the driver {VFIO}", f"run `modprobe {VFIO}`, and add it to /etc/modules-load.d")


def _check_disks(facts: Facts) -> Finding:
    """Only what the survey tells: uses of a disk are examined when a guest requests it."""
    found = facts.topology.controllers
    if not found:
        return failed(
            "no NVMe controllers",
            "a disk of its own for a guest that needs one",
            "guests can use network disks or logical volumes",
        )
    faults = [f"{one.address}: {one.fault}" for one in found if one.fault]
    return passed("; ".join([f"{len(found)} NVMe controllers, one of which may be the server's own", *faults]))


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
        "each function is alone in its group",
        "groups of existing VFs and NVMe controllers",
        _check_groups,
    ),
    Check("vfio", _D, "the driver vfio-pci is there", "drivers in sysfs", _check_vfio),
    Check("disks", _D, "there are disks for guests", "PCI functions in sysfs", _check_disks, required=False),
)
