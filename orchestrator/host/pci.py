"""PCI functions: SR-IOV physical and virtual functions, their drivers and IOMMU groups. Writes are read back.

Sources: Documentation/ABI/testing/sysfs-bus-pci, Documentation/PCI/pci-iov-howto.rst, Documentation/driver-api/vfio.rst,
Documentation/ABI/testing/sysfs-kernel-iommu_groups.
"""

from __future__ import annotations

import re
from dataclasses import replace
from errno import EBUSY, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, EPERM, ERANGE

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.topology import IommuGroup, PhysicalFunction, VirtualFunction
from orchestrator.values import MacAddress, PciAddress

_DEVICES = "sys/bus/pci/devices"
_DRIVERS = "sys/bus/pci/drivers"
_GROUPS = "sys/kernel/iommu_groups"
# PCI Code and ID Assignment Specification 1.2: base class 02 network controller, sub-class 00 Ethernet.
_ETHERNET = "0x0200"
_VIRTFN = re.compile(r"virtfn(\d+)", re.ASCII)
_ENOTSUPP = 524  # include/linux/errno.h, inside the kernel only, but SR-IOV drivers let it out
_NUMVFS_HINTS = {
    EBUSY: "stop the guests that use VFs of this PF first",
    ENOENT: "no driver is bound to the PF, or its driver cannot do SR-IOV (`nohype survey`)",
    EPERM: "run as root; igb also says this without MSI-X, or while a VF is in use",
    ENOMEM: "the firmware left no room for the VFs' registers or bus numbers: switch SR-IOV on there, or boot with pci=realloc",
    EIO: "the PF must be up before VFs are made: ip link set IFACE up",
    _ENOTSUPP: "the PF's driver cannot make VFs; switch SR-IOV on in the card's firmware settings",
}


def read_pfs(host: HostRoot) -> tuple[PhysicalFunction, ...]:
    """All SR-IOV capable Ethernet functions, in the order of their addresses.

    Raises:
        HostError: sysfs has no PCI bus, or a file of a function cannot be read.
    """
    names = [name for name in host.names(_DEVICES) if host.exists(f"{_DEVICES}/{name}/sriov_totalvfs")]
    addresses = sorted(PciAddress.parse(name) for name in names)
    return tuple(_read_pf(host, address) for address in addresses if host.read(f"{_folder(address)}/class").startswith(_ETHERNET))


def read_pf(host: HostRoot, address: PciAddress) -> PhysicalFunction:
    """One SR-IOV physical function.

    Raises:
        HostError: there is none at the address, or a file of it cannot be read.
    """
    if not host.exists(f"{_folder(address)}/sriov_totalvfs"):
        raise HostError(f"{address} is no SR-IOV physical function", "`nohype survey` shows what there is", ENODEV)
    return _read_pf(host, address)


def _read_pf(host: HostRoot, address: PciAddress) -> PhysicalFunction:
    folder = _folder(address)
    interface = _read_interface(host, folder)
    node = int(host.find(f"{folder}/numa_node") or "-1")
    return PhysicalFunction(
        address=address,
        interface=interface,
        device=f"{host.read(f'{folder}/vendor')[2:]}:{host.read(f'{folder}/device')[2:]}",
        driver=read_driver(host, address),
        node=node if node >= 0 else None,
        up=interface is not None and _read_up(host, f"{folder}/net/{interface}"),
        mac=_read_mac(host, f"{folder}/net/{interface}") if interface else None,
        total_vfs=int(host.read(f"{folder}/sriov_totalvfs")),
        first_vf_offset=int(host.read(f"{folder}/sriov_offset")),
        vf_stride=int(host.read(f"{folder}/sriov_stride")),
        vfs=_read_vfs(host, address),
    )


def read_link(host: HostRoot, pf: PhysicalFunction) -> PhysicalFunction:
    """A PF that was read before, with its interface and link as they are now.

    Raises:
        HostError: the function is gone, or a file of it cannot be read.
    """
    folder = _folder(pf.address)
    interface = _read_interface(host, folder)
    return replace(pf, interface=interface, up=interface is not None and _read_up(host, f"{folder}/net/{interface}"))


def read_up(host: HostRoot, pf: PciAddress, interface: str) -> bool:
    """Whether a PF has this interface, and it is administratively up and has carrier.

    Raises:
        HostError: a file of the interface cannot be read.
    """
    folder = f"{_folder(pf)}/net/{interface}"
    return host.exists(folder) and _read_up(host, folder)


def read_functions(host: HostRoot) -> frozenset[PciAddress]:
    """The addresses of all PCI functions.

    Raises:
        HostError: sysfs has no PCI bus.
    """
    return frozenset(map(PciAddress.parse, host.names(_DEVICES)))


def _read_interface(host: HostRoot, folder: str) -> str | None:
    """The interface in this network namespace; the first where a driver makes several (two ports on one function)."""
    if not host.exists(f"{folder}/net"):
        return None
    return next(iter(host.names(f"{folder}/net")), None)


def _read_up(host: HostRoot, folder: str) -> bool:
    """Administratively up and with carrier. The file `carrier` of an interface that is down cannot even be read (EINVAL)."""
    return host.read(f"{folder}/operstate") == "up" and host.read(f"{folder}/carrier") == "1"


def _read_mac(host: HostRoot, folder: str) -> MacAddress:
    return MacAddress.parse(host.read(f"{folder}/address"))


def _read_vfs(host: HostRoot, pf: PciAddress) -> tuple[VirtualFunction, ...]:
    vfs: list[VirtualFunction] = []
    for name in host.names(_folder(pf)):
        match = _VIRTFN.fullmatch(name)
        target = host.link(f"{_folder(pf)}/{name}") if match else None
        if match and target:
            address = PciAddress.parse(target)
            vfs.append(VirtualFunction(address, int(match[1]), read_driver(host, address), _read_group_number(host, address)))
    return tuple(sorted(vfs, key=lambda vf: vf.index))


def read_numvfs(host: HostRoot, pf: PciAddress) -> int:
    """How many VFs a PF has now.

    Raises:
        HostError: the function is not there, or is no PF (ENOENT).
    """
    return int(host.read(f"{_folder(pf)}/sriov_numvfs"))


def set_numvfs(host: HostRoot, pf: PciAddress, count: int) -> None:
    """Makes a PF have that many VFs, all of them new and without a driver, unless it has as many already.

    The caller brings the PF's interface up first, and waits for its carrier afterwards: drivers reset the NIC here.
    If it fails after the former VFs were removed, the message says so.

    Raises:
        HostError: a VF is in use by a guest (EBUSY), more than the PF can have (ERANGE), refused by the driver or the bus (see
            the hint), or another number was made, with both numbers.
    """
    before = read_numvfs(host, pf)
    if before == count:
        return
    total = int(host.read(f"{_folder(pf)}/sriov_totalvfs"))
    if not 0 <= count <= total:
        raise HostError(f"cannot give PF {pf} {count} VFs: it can have {total}", errno=ERANGE)
    for vf in _read_vfs(host, pf):
        _refuse_if_in_use(host, vf.address, f"cannot change the number of VFs of PF {pf} from {before} to {count}")
    try:
        _write_numvfs(host, pf, before, count)
    except HostError as error:
        lost = f" (it had {before}, and now has {read_numvfs(host, pf)})" if before else ""
        hint = _NUMVFS_HINTS.get(error.errno, error.hint)
        raise HostError(f"cannot give PF {pf} {count} VFs{lost}", hint, error.errno) from None
    actual = read_numvfs(host, pf)
    if actual != count:
        raise HostError(f"PF {pf} was to have {count} VFs, but has {actual}", "the kernel's log says why: dmesg")


def _write_numvfs(host: HostRoot, pf: PciAddress, before: int, count: int) -> None:
    """Without the drivers' probing for the time: the host's own VF driver would take each VF, only to be thrown off again."""
    autoprobe = f"{_folder(pf)}/sriov_drivers_autoprobe"
    probing = host.read(autoprobe)
    host.write(autoprobe, "0")
    try:
        # The kernel refuses to go from one number to another (EBUSY): pci-iov-howto.rst, sriov_numvfs_store().
        if before and count:
            host.write(f"{_folder(pf)}/sriov_numvfs", "0")
        host.write(f"{_folder(pf)}/sriov_numvfs", str(count))
    finally:
        host.write(autoprobe, probing)


def read_driver(host: HostRoot, address: PciAddress) -> str | None:
    """The name of the driver that is bound to a function, None if there is none, or no such function."""
    return host.link(f"{_folder(address)}/driver")


def bind_driver(host: HostRoot, address: PciAddress, driver: str) -> None:
    """Binds a function to a driver that need not know its id, such as vfio-pci, and takes it from the one that it has.

    Uses `driver_override`, since `new_id` would catch every function of that id. The override stays until `release_driver`.
    On an error the function may be left without a driver: `release_driver` puts it right.

    Raises:
        HostError: no such function or driver (ENOENT), the function is in use by a guest (EBUSY), or the driver did not take it.
    """
    _check_present(host, address)
    if not host.exists(f"{_DRIVERS}/{driver}"):
        raise HostError(f"cannot bind {address} to {driver}: no such driver is loaded", f"modprobe {driver}", ENOENT)
    before = read_driver(host, address)
    if before != driver:
        _refuse_if_in_use(host, address, f"cannot bind {address} to {driver}")
    host.write(f"{_folder(address)}/driver_override", driver)
    if before != driver:
        _unbind(host, address, before)
        _probe(host, address)
    _check_driver(host, address, driver)


def release_driver(host: HostRoot, address: PciAddress, original: str | None) -> None:
    """Gives a function back to the driver that it had before `bind_driver`, and clears the override; may be done twice.

    Args:
        original: the driver it had, None for none.

    Raises:
        HostError: no such function (ENOENT), it is still in use by a guest (EBUSY), or the driver did not take it back.
    """
    _check_present(host, address)
    before = read_driver(host, address)
    if before != original:
        _refuse_if_in_use(host, address, f"cannot give {address} back to {original or 'no driver'}")
        _unbind(host, address, before)
        if original:
            # Without an override a VF is not probed while its PF has sriov_drivers_autoprobe=0: pci_device_can_probe().
            host.write(f"{_folder(address)}/driver_override", original)
            _probe(host, address)
    # An empty line clears the override: Documentation/ABI/testing/sysfs-bus-pci.
    host.write(f"{_folder(address)}/driver_override", "\n")
    _check_driver(host, address, original)


def reset_function(host: HostRoot, address: PciAddress) -> bool:
    """Resets a function, so that nothing that its last user has left in it reaches the next one; whether it can be reset alone.

    Source: Documentation/ABI/testing/sysfs-bus-pci, ``reset``. Each VF has one of its own (SR-IOV 2.2.2).

    Raises:
        HostError: no such function (ENOENT), it is in use by a guest (EBUSY), or the reset failed.
    """
    _check_present(host, address)
    if not host.exists(f"{_folder(address)}/reset"):
        return False
    _refuse_if_in_use(host, address, f"cannot reset {address}")
    host.write(f"{_folder(address)}/reset", "1")
    return True


def read_iommu_groups(host: HostRoot) -> tuple[IommuGroup, ...]:
    """All IOMMU groups by number; none where no IOMMU is switched on.

    Raises:
        HostError: a group cannot be read.
    """
    if not host.exists(_GROUPS):
        return ()
    groups = []
    for number in sorted(map(int, host.names(_GROUPS))):
        try:
            groups.append(_read_group(host, number))
        except HostError as error:
            # A group goes with its last device, as those of VFs do when the VFs are taken away.
            if error.errno != ENOENT:
                raise
    return tuple(groups)


def read_iommu_group(host: HostRoot, address: PciAddress) -> IommuGroup | None:
    """The IOMMU group of a function with everything that is in it, None if it is in none.

    Raises:
        HostError: the group cannot be read.
    """
    number = _read_group_number(host, address)
    return None if number is None else _read_group(host, number)


def _read_group(host: HostRoot, number: int) -> IommuGroup:
    folder = f"{_GROUPS}/{number}"
    # Groups hold devices of other buses too, on Arm mostly; they can only be named, so they are left out here.
    devices = [name for name in host.names(f"{folder}/devices") if host.exists(f"{_DEVICES}/{name}")]
    return IommuGroup(number, host.read(f"{folder}/type"), tuple(sorted(map(PciAddress.parse, devices))))


def _read_group_number(host: HostRoot, address: PciAddress) -> int | None:
    number = host.link(f"{_folder(address)}/iommu_group")
    return None if number is None else int(number)


def _folder(address: PciAddress) -> str:
    return f"{_DEVICES}/{address}"


def _check_present(host: HostRoot, address: PciAddress) -> None:
    if not host.exists(_folder(address)):
        raise HostError(f"there is no PCI function {address}", "`nohype survey` shows what is there", ENODEV)


def _refuse_if_in_use(host: HostRoot, address: PciAddress, what: str) -> None:
    """To take a function from vfio-pci while a guest has it open, the kernel asks QEMU to unplug it and waits for ever.

    vfio-pci enables the function when it is opened and disables it when it is closed: vfio_pci_core_enable() and _disable().
    """
    if read_driver(host, address) == "vfio-pci" and host.read(f"{_folder(address)}/enable") != "0":
        raise HostError(f"{what}: {address} is in use by a guest", "stop the guest that has it (`nohype list`)", EBUSY)


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
