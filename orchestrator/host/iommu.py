"""IOMMU groups: what a device shares its address translation with, and why it has no group.

Sources: Documentation/driver-api/vfio.rst, Documentation/ABI/testing/sysfs-kernel-iommu_groups.
"""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOENT

from orchestrator.errors import HostError, RequestError
from orchestrator.host.pci import DEVICES, function_path, has_function
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import IommuGroup
from orchestrator.values import PciAddress

_GROUPS = "sys/kernel/iommu_groups"
_UNITS = "sys/class/iommu"


def read_iommu_groups(host: HostRoot) -> tuple[IommuGroup, ...]:
    """All IOMMU groups by number; none where no IOMMU is switched on. A group that cannot be read says so itself.

    Raises:
        HostError: the folder of all groups cannot be listed.
    """
    if not host.exists(_GROUPS):
        return ()
    found = [_find_group(host, int(name)) for name in sorted(filter(str.isdecimal, host.names(_GROUPS)), key=int)]
    return tuple(group for group in found if group)


def read_iommu_group(host: HostRoot, address: PciAddress) -> IommuGroup | None:
    """The IOMMU group of a function with everything that is in it, None if it is in none.

    Raises:
        HostError: the group cannot be read.
    """
    number = read_group_number(host, address)
    if number is None:
        return None
    return IommuGroup(number, host.read(f"{_GROUPS}/{number}/type"), _read_devices(host, number))


def read_group_number(host: HostRoot, address: PciAddress) -> int | None:
    """The number of a function's IOMMU group; None if it is in none, or there is no such function.

    Raises:
        HostError: the link cannot be read, or its target is no number.
    """
    name = f"{function_path(address)}/iommu_group"
    number = host.link(name)
    try:
        return None if number is None else int(number)
    except ValueError:
        raise HostError(f"/{name} is not understood: it leads to {number!r}") from None


def read_group_name(host: HostRoot, number: int) -> str | None:
    """The name is "vfio-noiommu" for a group that VFIO made without an IOMMU; None for most groups."""
    return host.find(f"{_GROUPS}/{number}/name")


def read_unit(host: HostRoot, address: PciAddress) -> tuple[str | None, bool]:
    """The IOMMU in front of a function, None if there is none, and whether this IOMMU lists the function."""
    unit = host.link(f"{function_path(address)}/iommu")
    folder = f"{_UNITS}/{unit}/devices"
    return unit, bool(unit) and host.exists(folder) and str(address) in host.names(folder)


def read_vfio_devices(host: HostRoot, address: PciAddress) -> tuple[str, ...]:
    """Device nodes of a function below /dev/vfio/devices: iommufd opens the device itself (Documentation/driver-api/vfio.rst)."""
    folder = f"{function_path(address)}/vfio-dev"
    return host.names(folder) if host.exists(folder) else ()


def read_unsafe_interrupts(host: HostRoot) -> str | None:
    """The parameter allow_unsafe_interrupts of vfio_iommu_type1, "Y" or "N"; None if the module does not exist."""
    return host.find("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")


def check_alone(host: HostRoot, address: PciAddress) -> None:
    """A device can be handed over only if its IOMMU group holds nothing else (kernel: Documentation/driver-api/vfio.rst).

    Raises:
        HostError: no such function (ENODEV), no IOMMU group, or one with other devices, each with its driver.
    """
    number = read_group_number(host, address)
    if number is None:
        raise _explain_no_group(host, address)
    devices = host.names(f"{_GROUPS}/{number}/devices")
    others = [f"{name} ({host.link(f'{DEVICES}/{name}/driver') or 'no driver'})" for name in devices if name != str(address)]
    if others:
        raise HostError(
            f"{address} shares IOMMU group {number} with {', '.join(others)}",
            "a root port with ACS gives each function a group of its own; try another slot",
        )
    if str(address) not in devices:
        raise HostError(f"IOMMU group {number} does not list {address}, whose link names it", "it has just changed: try again")


def _explain_no_group(host: HostRoot, address: PciAddress) -> HostError:
    """By cause: no such function, no IOMMU at all, or one that leaves this function out."""
    if not has_function(host, address):
        return HostError(f"there is no PCI function {address}", "`nohype survey` shows what is there", ENODEV)
    groups = len(host.names(_GROUPS)) if host.exists(_GROUPS) else 0
    if not groups:
        hint = "switch the IOMMU on in the firmware, and on Intel boot with intel_iommu=on"
        return HostError(f"{address} is in no IOMMU group: the host has no IOMMU in use", hint)
    hint = "the firmware's table (DMAR, IVRS) may leave its slot out: look for it in dmesg, or try another slot"
    return HostError(f"{address} is in no IOMMU group, though the host has {groups}", hint)


def _find_group(host: HostRoot, number: int) -> IommuGroup | None:
    """None if it is gone: a group goes with its last device, as those of VFs do when the VFs are taken away."""
    try:
        devices = _read_devices(host, number)
    except HostError as error:
        return None if error.errno == ENOENT else IommuGroup(number, "", (), error.message)
    try:
        return IommuGroup(number, host.find(f"{_GROUPS}/{number}/type") or "", devices)
    except HostError:
        return IommuGroup(number, "", devices)


def _read_devices(host: HostRoot, number: int) -> tuple[PciAddress, ...]:
    """Groups hold devices of other buses too, on Arm mostly; those can only be named, so they are left out here."""
    folder = f"{_GROUPS}/{number}/devices"
    return tuple(sorted(_parse(name) for name in host.names(folder) if host.exists(f"{DEVICES}/{name}")))


def _parse(name: str) -> PciAddress:
    try:
        return PciAddress.parse(name)
    except RequestError as error:
        raise HostError(f"an IOMMU group holds {name}: {error.message}", errno=EINVAL) from None
