"""PCI functions and their drivers (Documentation/ABI/testing/sysfs-bus-pci, Documentation/driver-api/vfio.rst)."""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENODEV, ENOENT, EPERM
from typing import TYPE_CHECKING

from orchestrator.errors import HostError
from orchestrator.values import PciAddress

if TYPE_CHECKING:  # programs that need only names start faster
    from orchestrator.host.root import HostRoot

DEVICES = "sys/bus/pci/devices"
_DRIVERS = "sys/bus/pci/drivers"
VFIO = "vfio-pci"


def read_functions(host: HostRoot) -> frozenset[PciAddress]:
    return frozenset(map(PciAddress.parse, host.names(DEVICES)))


def function_path(address: PciAddress) -> str:
    return f"{DEVICES}/{address}"


def has_function(host: HostRoot, address: PciAddress) -> bool:
    return host.exists(function_path(address))


def is_pf(host: HostRoot, address: PciAddress) -> bool:
    return host.exists(f"{function_path(address)}/sriov_totalvfs")


def read_driver(host: HostRoot, address: PciAddress) -> str | None:
    """None if no driver is bound or the function does not exist."""
    return host.link(f"{function_path(address)}/driver")


def is_loaded(host: HostRoot, driver: str) -> bool:
    return host.exists(f"{_DRIVERS}/{driver}")


def shows_drivers(host: HostRoot) -> bool:
    return host.exists(_DRIVERS)


def bind_driver(host: HostRoot, address: PciAddress, driver: str) -> None:
    """Binds a function to a driver, also if the driver does not list the function's id.

    The driver override stays until `release_driver`, which also repairs a function that an error left without a driver.
    Raises HostError if function or driver do not exist (ENODEV, ENOENT), a guest uses the function (EBUSY), or binding fails.
    """
    # By driver_override: new_id would match every function of the id.
    _check_no_pf(host, address)
    if not is_loaded(host, driver):
        raise HostError(f"cannot bind {address} to {driver}: driver not loaded", f"`modprobe {driver}`", ENOENT)
    before = read_driver(host, address)
    if before != driver:
        refuse_if_in_use(host, address, f"cannot bind {address} to {driver}")
    host.write(f"{function_path(address)}/driver_override", driver)
    if before != driver:
        _unbind(host, address, before)
        _probe(host, address)
    _check_driver(host, address, driver)


def release_driver(host: HostRoot, address: PciAddress, original: str | None, override: str = "") -> None:
    """Restores the driver (None for no driver) and the override ("" for none) of before `bind_driver`. Idempotent."""
    _check_no_pf(host, address)
    before = read_driver(host, address)
    if before != original:
        refuse_if_in_use(host, address, f"cannot restore driver {original or 'none'} of {address}")
        _unbind(host, address, before)
        if original:
            # Without an override a VF is not probed while its PF has sriov_drivers_autoprobe=0: pci_device_can_probe().
            host.write(f"{function_path(address)}/driver_override", original)
            _probe(host, address)
    # An empty line clears the override: Documentation/ABI/testing/sysfs-bus-pci.
    host.write(f"{function_path(address)}/driver_override", override or "\n")
    _check_driver(host, address, original)


def read_override(host: HostRoot, address: PciAddress) -> str:
    text = host.find(f"{function_path(address)}/driver_override") or ""
    return "" if text == "(null)" else text


def reset_function(host: HostRoot, address: PciAddress) -> bool:
    """Returns False if the function has no reset of its own; each VF must have one (SR-IOV 2.2.2).

    Raises HostError if the function does not exist (ENODEV), a guest uses it (EBUSY), or the reset failed.
    """
    _check_no_pf(host, address)
    if not host.exists(f"{function_path(address)}/reset"):
        return False
    refuse_if_in_use(host, address, f"cannot reset {address}")
    host.write(f"{function_path(address)}/reset", "1")
    return True


def is_nvme(host: HostRoot, address: PciAddress) -> bool:
    """False if the function does not exist."""
    # PCI Code and ID Assignment Specification 1.8: mass storage, NVM, NVM Express I/O controller. An administrative controller
    # (interface 03) has no namespaces.
    return host.find(f"{function_path(address)}/class") == "0x010802"


def is_idle_nvme(host: HostRoot, address: PciAddress) -> bool:
    """An NVMe controller without VFs. Many server disks have the SR-IOV capability, and are PFs only by that."""
    return is_nvme(host, address) and host.find(f"{function_path(address)}/sriov_numvfs") in (None, "0")


def _check_no_pf(host: HostRoot, address: PciAddress) -> None:
    # A PF of a NIC carries the host's traffic and all VFs. It must not lose its driver or be reset.
    if not host.exists(function_path(address)):
        raise HostError(f"PCI function {address} does not exist", "check the address with `nohype survey`", ENODEV)
    if is_pf(host, address) and not is_idle_nvme(host, address):
        what = f"{address} is a physical function (driver {read_driver(host, address) or 'none'}), not a VF: not changed"
        raise HostError(what, "if its driver was changed, bind the original driver manually", EPERM)


def refuse_if_in_use(host: HostRoot, address: PciAddress, what: str) -> None:
    """To unbind an open function from vfio-pci, the kernel requests an unplug from QEMU and waits indefinitely."""
    # vfio-pci enables the function when it is opened and disables it when it is closed: vfio_pci_core_enable() and _disable().
    if read_driver(host, address) == VFIO and host.read(f"{function_path(address)}/enable") != "0":
        raise HostError(f"{what}: {address} is in use by a guest", "stop the guest that uses it: `nohype guest list`", EBUSY)


def _unbind(host: HostRoot, address: PciAddress, driver: str | None) -> None:
    if driver:
        host.write(f"{_DRIVERS}/{driver}/unbind", str(address))


def _probe(host: HostRoot, address: PciAddress) -> None:
    try:
        host.write("sys/bus/pci/drivers_probe", str(address))
    except HostError as error:
        # Some kernels return EINVAL or ENODEV if the driver's probe failed. The check of the driver then reports both drivers.
        if error.errno not in (EINVAL, ENODEV):
            raise


def _check_driver(host: HostRoot, address: PciAddress, driver: str | None) -> None:
    actual = read_driver(host, address)
    if actual != driver:
        raise HostError(
            f"{address}: requested driver {driver or 'none'}, bound driver {actual or 'none'}",
            "check the kernel log with dmesg; vfio-pci requires an IOMMU group",
        )
