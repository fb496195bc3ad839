"""SR-IOV: physical functions, their virtual functions, and whether one is what it is taken for. Writes are read back.

Sources: Documentation/PCI/pci-iov-howto.rst, Documentation/ABI/testing/sysfs-bus-pci, drivers/pci/iov.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from errno import EBUSY, EIO, ENODEV, ENOENT, ENOMEM, EPERM, ERANGE
from functools import cache

from orchestrator.errors import HostError, RequestError
from orchestrator.host.iommu import read_group_number
from orchestrator.host.pci import DEVICES, VFIO, function_path, is_pf, read_driver, refuse_if_in_use
from orchestrator.host.ports import describe_absence, describe_use, read_ports
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import PhysicalFunction, VirtualFunction
from orchestrator.values import PciAddress

# PCI Code and ID Assignment Specification 1.2: base class 02, network controller. What of it is Ethernet its interfaces say.
_NETWORK = "0x02"
# Drivers that keep a function for a virtual machine without saying so in a folder of their own.
_SET_ASIDE = ("pci-stub", "xen-pciback", "pciback")
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
    """All SR-IOV capable network functions, in the order of their addresses. One that cannot be read says so itself.

    Raises:
        HostError: sysfs has no PCI bus.
    """
    names = [name for name in host.names(DEVICES) if host.exists(f"{DEVICES}/{name}/sriov_totalvfs")]
    return tuple(_try_pf(host, address) for address in sorted(map(PciAddress.parse, names)) if _is_network(host, address))


def read_pf(host: HostRoot, address: PciAddress, known: Sequence[str] = ()) -> PhysicalFunction:
    """One SR-IOV physical function.

    Args:
        known: names that its interface may have; asked only where there are several.

    Raises:
        HostError: there is none at the address, or a file of it cannot be read.
    """
    if not is_pf(host, address):
        raise _explain_no_pf(address)
    pf = _read_pf(host, address)
    return next((found for name in known if (found := pf.at(name)) and not found.fault), pf)


def _explain_no_pf(address: PciAddress) -> HostError:
    return HostError(f"there is no SR-IOV physical function {address}", "`nohype survey` shows what there is", ENODEV)


def _is_network(host: HostRoot, address: PciAddress) -> bool:
    """By its class, or by its interfaces: some cards give themselves another class."""
    try:
        return host.read(f"{function_path(address)}/class").startswith(_NETWORK) or host.exists(f"{function_path(address)}/net")
    except HostError:
        return host.exists(f"{function_path(address)}/net")


def _try_pf(host: HostRoot, address: PciAddress) -> PhysicalFunction:
    try:
        return _read_pf(host, address)
    except (HostError, RequestError, ValueError) as error:
        fault = f"it cannot be read: {getattr(error, 'message', error)}"
        return PhysicalFunction(
            address, None, "", None, None, up=False, mac=None, total_vfs=0, first_vf_offset=0, vf_stride=0, vfs=(), fault=fault
        )


def _read_pf(host: HostRoot, address: PciAddress) -> PhysicalFunction:
    folder = function_path(address)
    node = _read_number(host, f"{folder}/numa_node") if host.exists(f"{folder}/numa_node") else -1
    pf = PhysicalFunction(
        address=address,
        interface=None,
        device=f"{host.read(f'{folder}/vendor')[2:]}:{host.read(f'{folder}/device')[2:]}",
        driver=read_driver(host, address),
        node=node if node >= 0 else None,
        up=False,
        mac=None,
        total_vfs=_read_number(host, f"{folder}/sriov_totalvfs"),
        first_vf_offset=_read_number(host, f"{folder}/sriov_offset"),
        vf_stride=_read_number(host, f"{folder}/sriov_stride"),
        vfs=_read_vfs(host, address),
    )
    return read_link(host, pf)


def read_link(host: HostRoot, pf: PhysicalFunction) -> PhysicalFunction:
    """A PF that was read before, with its interfaces and links as they are now."""
    try:
        ports = read_ports(host, pf.address)
        fault = "" if ports else f"it has no network interface: {describe_absence(host, pf.address)}"
    except HostError as error:
        ports, fault = (), f"its network interfaces cannot be read: {error.message}"
    if not ports:
        return replace(pf, interface=None, up=False, mac=None, fault=fault, siblings=())
    own, *others = ports
    return replace(pf, interface=own.name, up=own.up, mac=own.mac, fault=own.fault, siblings=tuple(others))


def _read_vfs(host: HostRoot, pf: PciAddress) -> tuple[VirtualFunction, ...]:
    vfs: list[VirtualFunction] = []
    addressed = cache(host.net.read_addressed)
    for name in host.names(function_path(pf)):
        match = _VIRTFN.fullmatch(name)
        target = host.link(f"{function_path(pf)}/{name}") if match else None
        if match and target:
            vfs.append(_read_vf(host, PciAddress.parse(target), int(match[1]), addressed))
    return tuple(sorted(vfs, key=lambda vf: vf.index))


def _read_vf(host: HostRoot, address: PciAddress, index: int, addressed: Callable[[], Container[str]]) -> VirtualFunction:
    """A VF that cannot be read says so itself, and counts as used: the others must not suffer from it."""
    try:
        driver, group = read_driver(host, address), read_group_number(host, address)
        return VirtualFunction(address, index, driver, group, read_use(host, address, addressed))
    except HostError as error:
        return VirtualFunction(address, index, None, None, f"whether it is in use cannot be told: {error.message}")


def read_use(host: HostRoot, vf: PciAddress, addressed: Callable[[], Container[str]] | None = None) -> str:
    """How the host itself uses a VF, in words; empty if it does not, as for one without a driver or with vfio-pci.

    In use is a VF whose interface is up, is a port of another one, has one above it, has an IP address, or was moved to another
    network namespace: what for, only the host's administrator knows.

    Args:
        addressed: the interfaces that have an IP address, where they were read already.
    """
    folder, driver = function_path(vf), read_driver(host, vf)
    if driver in (None, VFIO):
        return ""
    # uio_pci_generic, igb_uio: DPDK. Other drivers of VFIO (mlx5_vfio_pci): another program hands it over.
    if host.exists(f"{folder}/uio") or host.exists(f"{folder}/vfio-dev") or driver in _SET_ASIDE:
        return f"its driver {driver} is for a program in user space, or a virtual machine"
    if not host.exists(f"{folder}/net"):
        return ""
    names = host.names(f"{folder}/net")
    if not names:
        return "its interface is in another network namespace"
    uses = [use for name in names if (use := describe_use(host, f"{folder}/net/{name}", name))]
    if uses:
        return "; ".join(uses)
    try:
        known = (addressed or host.net.read_addressed)()
    except HostError as error:
        return f"whether its interface {names[0]} has an IP address cannot be told: {error.message}"
    return next((f"its interface {name} has an IP address" for name in names if name in known), "")


def find_vf(host: HostRoot, pf: PciAddress, index: int) -> PciAddress | None:
    """Where VF number ``index`` of a PF is, by the kernel's own link; None if there is no such PF or VF.

    Raises:
        HostError: the link cannot be read, or leads to no PCI function.
    """
    name = f"{function_path(pf)}/virtfn{index}"
    target = host.link(name)
    try:
        return PciAddress.parse(target) if target else None
    except RequestError as error:
        raise HostError(f"/{name} is not understood: {error.message}") from None


def check_gone(host: HostRoot, pf: PciAddress, index: int, address: PciAddress) -> None:
    """A VF is gone only if both links say so, the PF's to the function and the function's to the PF, or it is another VF by now.

    Raises:
        HostError: one of them is there without the other: the VF is just being made or removed.
    """
    folder = function_path(pf)
    names = host.names(folder) if host.exists(folder) else ()
    known = any(host.link(f"{folder}/{name}") == str(address) for name in names if _VIRTFN.fullmatch(name))
    if known != (host.link(f"{function_path(address)}/physfn") == str(pf)):
        what = f"only one of PF {pf} and {address}, which was its VF {index}, has a link to the other"
        raise HostError(what, "the VF is just being made or removed: try again")


def is_vf(host: HostRoot, address: PciAddress) -> bool:
    """Whether there is a virtual function at the address, of whatever PF."""
    return host.link(f"{function_path(address)}/physfn") is not None


def check_vf(host: HostRoot, pf: PciAddress, index: int, address: PciAddress) -> None:
    """Looks in the kernel whether this VF of this PF is the function at the address, before anything is done to it.

    Raises:
        HostError: there is no such VF (ENODEV), it is at another address, or the function is another PF's VF, or none; with both.
    """
    what, hint = f"VF {index} of PF {pf}", "the addresses of VFs change with their number: delete the guest and create it again"
    found = find_vf(host, pf, index)
    if found is None:
        raise HostError(f"there is no {what}, which was to be {address}", "`nohype survey` shows the VFs that exist", ENODEV)
    if found != address:
        raise HostError(f"{what} is {found}, not {address} as was planned", hint)
    physfn = host.link(f"{function_path(address)}/physfn")
    if physfn != str(pf):
        raise HostError(f"{address}, which was to be {what}, is {f'a VF of PF {physfn}' if physfn else 'not a VF'}", hint)


def read_numvfs(host: HostRoot, pf: PciAddress) -> int:
    """How many VFs a PF has now.

    Raises:
        HostError: the function is not there, or is no PF (ENODEV).
    """
    if not is_pf(host, pf):
        raise _explain_no_pf(pf)
    return _read_number(host, f"{function_path(pf)}/sriov_numvfs")


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
    total = _read_number(host, f"{function_path(pf)}/sriov_totalvfs")
    if not 0 <= count <= total:
        raise HostError(f"cannot give PF {pf} {count} VFs: it can have {total}", errno=ERANGE)
    what = f"cannot change the number of VFs of PF {pf} from {before} to {count}"
    for vf in _read_vfs(host, pf):
        refuse_if_in_use(host, vf.address, what)
        if vf.use:
            raise HostError(f"{what}: the host uses VF {vf.address}: {vf.use}", "set its interface down, or leave the VFs", EBUSY)
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
    autoprobe = f"{function_path(pf)}/sriov_drivers_autoprobe"
    probing = host.read(autoprobe)
    host.write(autoprobe, "0")
    try:
        # The kernel refuses to go from one number to another (EBUSY): pci-iov-howto.rst, sriov_numvfs_store().
        if before and count:
            host.write(f"{function_path(pf)}/sriov_numvfs", "0")
        host.write(f"{function_path(pf)}/sriov_numvfs", str(count))
    finally:
        host.write(autoprobe, probing)


def _read_number(host: HostRoot, name: str) -> int:
    text = host.read(name)
    try:
        return int(text)
    except ValueError:
        raise HostError(f"/{name} is not a number: {text!r}") from None
