"""IOMMU groups and VFIO (Documentation/driver-api/vfio.rst, Documentation/ABI/testing/sysfs-kernel-iommu_groups)."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, ENODEV, ENOENT

from orchestrator.errors import HostError, RequestError
from orchestrator.host.pci import DEVICES, function_path, has_function
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import IommuGroup
from orchestrator.values import PciAddress

_GROUPS = "sys/kernel/iommu_groups"
_UNITS = "sys/class/iommu"
_CAP_PI = 1 << 59  # drivers/iommu/intel/iommu.h, cap_pi_support()
_FEATURE_GAM_VAPIC = 1 << 21  # drivers/iommu/amd/amd_iommu_types.h


def read_iommu_groups(host: HostRoot) -> tuple[IommuGroup, ...]:
    """All IOMMU groups by number, none without an active IOMMU. If a group cannot be read, its `fault` has the reason."""
    if not host.exists(_GROUPS):
        return ()
    found = [_find_group(host, int(name)) for name in sorted(filter(str.isdecimal, host.names(_GROUPS)), key=int)]
    return tuple(group for group in found if group)


def read_iommu_group(host: HostRoot, address: PciAddress) -> IommuGroup | None:
    number = read_group_number(host, address)
    if number is None:
        return None
    return IommuGroup(number, host.read(f"{_GROUPS}/{number}/type"), _read_devices(host, number))


def read_group_number(host: HostRoot, address: PciAddress) -> int | None:
    """None if the function does not exist or has no IOMMU group."""
    name = f"{function_path(address)}/iommu_group"
    number = host.link(name)
    try:
        return None if number is None else int(number)
    except ValueError:
        raise HostError(f"cannot parse the link /{name}: {number!r} is not a number") from None


def read_group_name(host: HostRoot, number: int) -> str | None:
    """The name is "vfio-noiommu" for a group that VFIO created without an IOMMU, and None for most groups."""
    return host.find(f"{_GROUPS}/{number}/name")


def is_without_iommu(host: HostRoot, number: int) -> bool:
    """VFIO made the group for a function that it drives without an IOMMU (vfio.enable_unsafe_noiommu_mode)."""
    return read_group_name(host, number) == "vfio-noiommu"


def read_unit(host: HostRoot, address: PciAddress) -> tuple[str | None, bool]:
    """The IOMMU of a function, None if there is none, and whether this IOMMU lists the function."""
    unit = host.link(f"{function_path(address)}/iommu")
    folder = f"{_UNITS}/{unit}/devices"
    return unit, bool(unit) and host.exists(folder) and str(address) in host.names(folder)


@dataclass(frozen=True)
class IommuUnit:
    name: str
    kind: str  # "VT-d", "AMD-Vi"; "other" for emulated and other ones
    posts_interrupts: bool | None  # to running virtual CPUs; None if it does not tell


def read_units(host: HostRoot) -> tuple[IommuUnit, ...]:
    """All IOMMUs that the kernel drives."""
    return tuple(_read_unit(host, name) for name in host.names(_UNITS)) if host.exists(_UNITS) else ()


def _read_unit(host: HostRoot, name: str) -> IommuUnit:
    folder = f"{_UNITS}/{name}"
    if host.exists(f"{folder}/intel-iommu"):
        return IommuUnit(name, "VT-d", _has_bit(host, f"{folder}/intel-iommu/cap", _CAP_PI))
    if host.exists(f"{folder}/amd-iommu"):
        # One word, or two in an order that has changed between releases; the bit has another meaning in the second.
        return IommuUnit(name, "AMD-Vi", _has_bit(host, f"{folder}/amd-iommu/features", _FEATURE_GAM_VAPIC))
    return IommuUnit(name, "other", None)


def _has_bit(host: HostRoot, name: str, bit: int) -> bool | None:
    """None if the register cannot be read, or if only one of two words has the bit: the unit is there all the same."""
    try:
        words = [int(word, 16) for word in host.read(name).split(":")]
    except (HostError, ValueError):
        return None
    found = {bool(word & bit) for word in words if word} or {False}
    return found.pop() if len(found) == 1 else None


def is_visible(host: HostRoot) -> bool:
    """Whether /sys shows what the kernel has of IOMMUs: every kernel has the folder next to that of the groups."""
    return host.exists(_GROUPS) or host.exists("sys/kernel/mm")


def read_vfio_devices(host: HostRoot, address: PciAddress) -> tuple[str, ...]:
    """Device nodes of a function below /dev/vfio/devices: iommufd opens the device itself (Documentation/driver-api/vfio.rst)."""
    folder = f"{function_path(address)}/vfio-dev"
    return host.names(folder) if host.exists(folder) else ()


def read_unsafe_interrupts(host: HostRoot) -> str | None:
    """The parameter allow_unsafe_interrupts of vfio_iommu_type1, "Y" or "N"; None if the module does not exist."""
    return host.find("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")


def check_alone(host: HostRoot, address: PciAddress) -> None:
    """Raises HostError if the function does not exist (ENODEV), has no IOMMU group, or its group contains other devices: then it
    cannot be passed through (Documentation/driver-api/vfio.rst).
    """
    number = read_group_number(host, address)
    if number is None:
        raise _explain_no_group(host, address)
    devices = host.names(f"{_GROUPS}/{number}/devices")
    others = [f"{name} ({host.link(f'{DEVICES}/{name}/driver') or 'no driver'})" for name in devices if name != str(address)]
    if others:
        raise HostError(
            f"{address} shares IOMMU group {number} with {', '.join(others)}",
            "move the card to a slot below a root port with ACS, so that each function has its own group",
        )
    if str(address) not in devices:
        what = f"{address} links to IOMMU group {number}, but the group does not list it"
        raise HostError(what, "retry: the group has just changed")


def _explain_no_group(host: HostRoot, address: PciAddress) -> HostError:
    if not has_function(host, address):
        return HostError(f"PCI function {address} does not exist", "check the address with `nohype survey`", ENODEV)
    groups = len(host.names(_GROUPS)) if host.exists(_GROUPS) else 0
    if not groups:
        hint = "enable the IOMMU in the firmware, and on Intel boot with intel_iommu=on"
        return HostError(f"{address} has no IOMMU group: the host does not use an IOMMU", hint)
    hint = "check dmesg: the firmware's table (DMAR, IVRS) may omit the slot; otherwise use another slot"
    return HostError(f"{address} has no IOMMU group, but the host has {groups} groups", hint)


def _find_group(host: HostRoot, number: int) -> IommuGroup | None:
    # None if it does not exist: a group disappears with its last device, for example when VFs are removed.
    try:
        devices = _read_devices(host, number)
    except HostError as error:
        return None if error.errno == ENOENT else IommuGroup(number, "", (), error.message)
    try:
        return IommuGroup(number, host.find(f"{_GROUPS}/{number}/type") or "", devices)
    except HostError:
        return IommuGroup(number, "", devices)


def _read_devices(host: HostRoot, number: int) -> tuple[PciAddress, ...]:
    # Groups can contain devices of other buses, mostly on Arm. These are left out.
    folder = f"{_GROUPS}/{number}/devices"
    return tuple(sorted(_parse(name) for name in host.names(folder) if host.exists(f"{DEVICES}/{name}")))


def _parse(name: str) -> PciAddress:
    try:
        return PciAddress.parse(name)
    except RequestError as error:
        raise HostError(f"an IOMMU group contains {name}: {error.message}", errno=EINVAL) from None
