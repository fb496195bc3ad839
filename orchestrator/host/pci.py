"""PCI functions and their drivers. Writes are read back.

Sources: Documentation/ABI/testing/sysfs-bus-pci, Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENODEV, ENOENT, EPERM

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.values import PciAddress

DEVICES = "sys/bus/pci/devices"
_DRIVERS = "sys/bus/pci/drivers"
VFIO = "vfio-pci"
"""The driver that hands a function to a guest."""


def read_functions(host: HostRoot) -> frozenset[PciAddress]:
    """The addresses of all PCI functions.

    Raises:
        HostError: sysfs has no PCI bus.
    """
    return frozenset(map(PciAddress.parse, host.names(DEVICES)))


def function_path(address: PciAddress) -> str:
    return f"{DEVICES}/{address}"


def has_function(host: HostRoot, address: PciAddress) -> bool:
    return host.exists(function_path(address))


def is_pf(host: HostRoot, address: PciAddress) -> bool:
    """Whether there is an SR-IOV physical function at the address."""
    return host.exists(f"{function_path(address)}/sriov_totalvfs")


def read_driver(host: HostRoot, address: PciAddress) -> str | None:
    """The name of the driver that is bound to a function, None if there is none, or no such function."""
    return host.link(f"{function_path(address)}/driver")


def is_loaded(host: HostRoot, driver: str) -> bool:
    """Whether the kernel has this driver for PCI functions now."""
    return host.exists(f"{_DRIVERS}/{driver}")


def bind_driver(host: HostRoot, address: PciAddress, driver: str) -> None:
    """Binds a function to a driver that need not know its id, such as vfio-pci, and takes it from the one that it has.

    Uses `driver_override`, since `new_id` would catch every function of that id. The override stays until `release_driver`.
    On an error the function may be left without a driver: `release_driver` puts it right.

    Raises:
        HostError: no such function or driver (ENOENT), the function is in use by a guest (EBUSY), or the driver did not take it.
    """
    _check_no_pf(host, address)
    if not is_loaded(host, driver):
        raise HostError(f"cannot bind {address} to {driver}: no such driver is loaded", f"modprobe {driver}", ENOENT)
    before = read_driver(host, address)
    if before != driver:
        refuse_if_in_use(host, address, f"cannot bind {address} to {driver}")
    host.write(f"{function_path(address)}/driver_override", driver)
    if before != driver:
        _unbind(host, address, before)
        _probe(host, address)
    _check_driver(host, address, driver)


def release_driver(host: HostRoot, address: PciAddress, original: str | None, override: str = "") -> None:
    """Gives a function back to the driver that it had before `bind_driver`, and puts the override back; may be done twice.

    Args:
        original: the driver it had, None for none.
        override: the override it had, empty for none.

    Raises:
        HostError: no such function (ENOENT), it is still in use by a guest (EBUSY), or the driver did not take it back.
    """
    _check_no_pf(host, address)
    before = read_driver(host, address)
    if before != original:
        refuse_if_in_use(host, address, f"cannot give {address} back to {original or 'no driver'}")
        _unbind(host, address, before)
        if original:
            # Without an override a VF is not probed while its PF has sriov_drivers_autoprobe=0: pci_device_can_probe().
            host.write(f"{function_path(address)}/driver_override", original)
            _probe(host, address)
    # An empty line clears the override: Documentation/ABI/testing/sysfs-bus-pci.
    host.write(f"{function_path(address)}/driver_override", override or "\n")
    _check_driver(host, address, original)


def read_override(host: HostRoot, address: PciAddress) -> str:
    """The driver that a function is kept for (`driver_override`), empty for none."""
    text = host.find(f"{function_path(address)}/driver_override") or ""
    return "" if text == "(null)" else text


def reset_function(host: HostRoot, address: PciAddress) -> bool:
    """Resets a function, so that nothing that its last user has left in it reaches the next one; whether it can be reset alone.

    Source: Documentation/ABI/testing/sysfs-bus-pci, ``reset``. Each VF has one of its own (SR-IOV 2.2.2).

    Raises:
        HostError: no such function (ENOENT), it is in use by a guest (EBUSY), or the reset failed.
    """
    _check_no_pf(host, address)
    if not host.exists(f"{function_path(address)}/reset"):
        return False
    refuse_if_in_use(host, address, f"cannot reset {address}")
    host.write(f"{function_path(address)}/reset", "1")
    return True


def _check_no_pf(host: HostRoot, address: PciAddress) -> None:
    """A PF carries its VFs, and the host's own traffic: nothing here ever takes its driver from it, or resets it."""
    if not host.exists(function_path(address)):
        raise HostError(f"there is no PCI function {address}", "`nohype survey` shows what is there", ENODEV)
    if is_pf(host, address):
        what = f"{address} is a physical function (driver {read_driver(host, address) or 'none'}), not a VF: it is left alone"
        raise HostError(what, "if its driver was changed, bind it to its own by hand", EPERM)


def refuse_if_in_use(host: HostRoot, address: PciAddress, what: str) -> None:
    """To take a function from vfio-pci while a guest has it open, the kernel asks QEMU to unplug it and waits for ever.

    vfio-pci enables the function when it is opened and disables it when it is closed: vfio_pci_core_enable() and _disable().
    """
    if read_driver(host, address) == VFIO and host.read(f"{function_path(address)}/enable") != "0":
        raise HostError(f"{what}: {address} is in use by a guest", "stop the guest that has it (`nohype guest list`)", EBUSY)


def _unbind(host: HostRoot, address: PciAddress, driver: str | None) -> None:
    if driver:
        host.write(f"{_DRIVERS}/{driver}/unbind", str(address))


def _probe(host: HostRoot, address: PciAddress) -> None:
    try:
        host.write("sys/bus/pci/drivers_probe", str(address))
    except HostError as error:
        # EINVAL and ENODEV are how some kernels pass on that the driver's probe failed; the read-back names the driver.
        if error.errno not in (EINVAL, ENODEV):
            raise


def _check_driver(host: HostRoot, address: PciAddress, driver: str | None) -> None:
    actual = read_driver(host, address)
    if actual != driver:
        raise HostError(
            f"{address} was to have {driver or 'no driver'}, but has {actual or 'none'}",
            "the kernel's log says why: dmesg; vfio-pci wants an IOMMU group",
        )
