"""Checks of devices: IOMMU, its groups, VFIO, and functions that guests can get."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.doctor.firmware import enable_iommu
from orchestrator.host.cmdline import find_unsafe_words
from orchestrator.host.iommu import is_visible, is_without_iommu, read_units, read_unsafe_interrupts
from orchestrator.host.pci import VFIO, shows_drivers
from orchestrator.host.processor import has_remapped_interrupts
from orchestrator.values import PciAddress

_ON_HOST = "run the command on the server itself, and not in a container"


def _check_iommu(facts: Facts) -> Finding:
    every = facts.topology.iommu_groups
    groups = [group for group in every if not is_without_iommu(facts.host, group.number)]
    if not groups:
        if not is_visible(facts.host):
            return not_measured("IOMMU groups are not visible", "an IOMMU that the kernel uses", _ON_HOST)
        found = f"{len(every)} groups of functions that VFIO drives without an IOMMU" if every else "no IOMMU groups"
        return failed(found, "an IOMMU that the kernel uses", enable_iommu(facts))
    units = read_units(facts.host)
    kinds = [f"{sum(unit.kind == kind for unit in units)} {kind}" for kind in sorted({unit.kind for unit in units})]
    return passed(f"{len(groups)} IOMMU groups" + (f"; units: {', '.join(kinds)}" if kinds else ""))


def _check_interrupts(facts: Facts) -> Finding:
    needed = "interrupt remapping: a guest's device cannot send interrupts to other CPUs"
    if read_unsafe_interrupts(facts.host) in ("Y", "1"):
        remedy = "remove allow_unsafe_interrupts from the options of vfio_iommu_type1 in /etc/modprobe.d"
        return failed("VFIO was told to do without it (allow_unsafe_interrupts)", needed, remedy)
    if not facts.topology.iommu_groups:
        if not is_visible(facts.host):
            return not_measured("IOMMU groups are not visible", needed, _ON_HOST)
        return failed("without an IOMMU there is none", needed, enable_iommu(facts))
    if not has_remapped_interrupts(facts.host):
        return failed("no interrupt has a remapping chip (IR-)", needed, "enable x2APIC in the firmware settings")
    return passed("interrupts have remapping chips (IR-)")


def _check_overrides(facts: Facts) -> Finding:
    if found := find_unsafe_words(facts.cmdline):
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


def _foresee_faults(facts: Facts, pf: PciAddress) -> Iterator[str]:
    """What the group of a PF tells of its future VFs: a port without ACS puts all that is below it into one group.

    Other functions of the same card say nothing: VFs have no bus interface of a card with several functions.
    """
    group = facts.topology.group_of.get(pf)
    if group is None:
        yield f"{pf} has no IOMMU group"
        return
    card = (pf.domain, pf.bus, pf.device)
    if others := ", ".join(str(one) for one in group.devices if (one.domain, one.bus, one.device) != card):
        yield f"{pf} shares IOMMU group {group.number} with {others}"
    if group.type == "identity":
        yield f"IOMMU group {group.number} of {pf} is not translated (identity)"


def _check_groups(facts: Facts) -> Finding:
    functions = [vf.address for pf in facts.topology.pfs for vf in pf.vfs]
    needed = "each VF alone in its IOMMU group, with translated DMA"
    slot = "move the card to a slot below a root port with ACS; remove iommu=pt from the kernel's command line"
    if not functions:
        pfs = facts.topology.pfs if facts.topology.iommu_groups else ()
        if wrong := [fault for pf in pfs for fault in _foresee_faults(facts, pf.address)]:
            return failed(f"there are no VFs yet, and they would not be isolated: {'; '.join(wrong)}", needed, slot)
        remedy = "create VFs (`echo 2 > /sys/class/net/NAME/device/sriov_numvfs`), and run this again"
        return not_measured("there are no VFs yet", needed, remedy)
    if wrong := [fault for address in functions for fault in _find_faults(facts, address)]:
        return failed("; ".join(wrong), needed, slot)
    return passed(f"each of {len(functions)} VFs is alone in its group")


def _check_vfio(facts: Facts) -> Finding:
    if facts.topology.vfio:
        return passed(f"{VFIO} is loaded")
    if not shows_drivers(facts.host):
        return not_measured("drivers are not visible", f"the driver {VFIO}", _ON_HOST)
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
