"""SR-IOV physical and virtual functions (Documentation/PCI/pci-iov-howto.rst, drivers/pci/iov.c)."""

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

# PCI Code and ID Assignment Specification 1.2: base class 02, network controller (not only Ethernet).
_NETWORK = "0x02"
# Drivers that reserve a function for a virtual machine, without a folder in sysfs that shows it.
_RESERVING = ("pci-stub", "xen-pciback", "pciback")
_VIRTFN = re.compile(r"virtfn(\d+)", re.ASCII)
_ENOTSUPP = 524  # include/linux/errno.h: kernel-internal, but SR-IOV drivers return it to user space
_NUMVFS_HINTS = {
    EBUSY: "stop the guests that use VFs of this PF",
    ENOENT: "check with `nohype survey`: the PF has no driver, or its driver does not support SR-IOV",
    EPERM: "run as root; igb also returns this error without MSI-X, or while a VF is in use",
    ENOMEM: "not enough MMIO space or bus numbers: enable SR-IOV in the firmware or boot with pci=realloc",
    EIO: "set the PF's interface up before creating VFs: ip link set IFACE up",
    _ENOTSUPP: "enable SR-IOV in the card's firmware settings: the PF's driver cannot create VFs",
}


def read_pfs(host: HostRoot) -> tuple[PhysicalFunction, ...]:
    """All SR-IOV capable network functions by address. If one cannot be read, its `fault` has the reason."""
    names = [name for name in host.names(DEVICES) if host.exists(f"{DEVICES}/{name}/sriov_totalvfs")]
    return tuple(_try_pf(host, address) for address in sorted(map(PciAddress.parse, names)) if _is_network(host, address))


def read_pf(host: HostRoot, address: PciAddress, known: Sequence[str] = ()) -> PhysicalFunction:
    """Raises HostError (ENODEV) if the address is not an SR-IOV PF. `known` are expected names, used if it has several
    interfaces.
    """
    if not is_pf(host, address):
        raise _explain_no_pf(address)
    pf = _read_pf(host, address)
    return next((found for name in known if (found := pf.at(name)) and not found.fault), pf)


def _explain_no_pf(address: PciAddress) -> HostError:
    return HostError(f"{address} is not an SR-IOV physical function", "check the address with `nohype survey`", ENODEV)


def _is_network(host: HostRoot, address: PciAddress) -> bool:
    # By class or by interfaces: some network cards have another class.
    try:
        return host.read(f"{function_path(address)}/class").startswith(_NETWORK) or host.exists(f"{function_path(address)}/net")
    except HostError:
        return host.exists(f"{function_path(address)}/net")


def _try_pf(host: HostRoot, address: PciAddress) -> PhysicalFunction:
    try:
        return _read_pf(host, address)
    except (HostError, RequestError, ValueError) as error:
        fault = f"cannot be read: {getattr(error, 'message', error)}"
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
    """Reads the PF's interfaces and links again."""
    try:
        ports = read_ports(host, pf.address)
        fault = "" if ports else f"no network interface: {describe_absence(host, pf.address)}"
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
    # A VF that cannot be read counts as used, and must not prevent the use of other VFs.
    try:
        driver, group = read_driver(host, address), read_group_number(host, address)
        return VirtualFunction(address, index, driver, group, read_use(host, address, addressed))
    except HostError as error:
        return VirtualFunction(address, index, None, None, f"its use cannot be determined: {error.message}")


def read_use(host: HostRoot, vf: PciAddress, addressed: Callable[[], Container[str]] | None = None) -> str:
    """How the host uses a VF; empty if it does not. A VF without a driver or with vfio-pci is not in use.

    A VF is in use if its interface is up, a port, has an upper device or IP address, or is in another network namespace.
    `addressed` returns the interfaces with an IP address, to read them only once for many VFs.
    """
    folder, driver = function_path(vf), read_driver(host, vf)
    if driver in (None, VFIO):
        return ""
    # uio_pci_generic, igb_uio: DPDK. Other VFIO drivers (mlx5_vfio_pci): another program passes the VF through.
    if host.exists(f"{folder}/uio") or host.exists(f"{folder}/vfio-dev") or driver in _RESERVING:
        return f"its driver {driver} serves a user-space program or a virtual machine"
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
        return f"the IP addresses of its interface {names[0]} cannot be read: {error.message}"
    return next((f"its interface {name} has an IP address" for name in names if name in known), "")


def find_vf(host: HostRoot, pf: PciAddress, index: int) -> PciAddress | None:
    """The address of a VF by the kernel's link; None if PF or VF do not exist."""
    name = f"{function_path(pf)}/virtfn{index}"
    target = host.link(name)
    try:
        return PciAddress.parse(target) if target else None
    except RequestError as error:
        raise HostError(f"cannot parse the link /{name}: {error.message}") from None


def check_gone(host: HostRoot, pf: PciAddress, index: int, address: PciAddress) -> None:
    """For a VF that `find_vf` does not find: raises HostError if only one of the links between PF and function exists. Both links
    are missing, or both exist for another index, if the VF does not exist any more.
    """
    folder = function_path(pf)
    names = host.names(folder) if host.exists(folder) else ()
    known = any(host.link(f"{folder}/{name}") == str(address) for name in names if _VIRTFN.fullmatch(name))
    if known != (host.link(f"{function_path(address)}/physfn") == str(pf)):
        what = f"the links between PF {pf} and its former VF {index} ({address}) are incomplete"
        raise HostError(what, "retry: the VF is being created or removed")


def is_vf(host: HostRoot, address: PciAddress) -> bool:
    return host.link(f"{function_path(address)}/physfn") is not None


def check_vf(host: HostRoot, pf: PciAddress, index: int, address: PciAddress) -> None:
    """Raises HostError if the VF does not exist (ENODEV), has another address, or the function is not a VF of this PF. Called
    before each change of a VF.
    """
    what, hint = f"VF {index} of PF {pf}", "delete the guest and create it again: addresses of VFs change with the number of VFs"
    found = find_vf(host, pf, index)
    if found is None:
        raise HostError(f"{what} does not exist, expected at {address}", "check the VFs with `nohype survey`", ENODEV)
    if found != address:
        raise HostError(f"{what} is {found}, expected {address}", hint)
    physfn = host.link(f"{function_path(address)}/physfn")
    if physfn != str(pf):
        raise HostError(f"{address} is {f'a VF of PF {physfn}' if physfn else 'not a VF'}, expected {what}", hint)


def read_numvfs(host: HostRoot, pf: PciAddress) -> int:
    """Raises HostError (ENODEV) if the address is not an SR-IOV PF."""
    if not is_pf(host, pf):
        raise _explain_no_pf(pf)
    return _read_number(host, f"{function_path(pf)}/sriov_numvfs")


def set_numvfs(host: HostRoot, pf: PciAddress, count: int) -> None:
    """Replaces the VFs of a PF by `count` new VFs without driver; no-op if the number is the same.

    The PF's interface must be up, and its carrier returns later: drivers reset the NIC. Raises HostError if a guest or the host
    uses a VF (EBUSY), the PF cannot have as many (ERANGE), or the kernel refuses; the message tells whether VFs were removed.
    """
    before = read_numvfs(host, pf)
    if before == count:
        return
    total = _read_number(host, f"{function_path(pf)}/sriov_totalvfs")
    if not 0 <= count <= total:
        raise HostError(f"cannot create {count} VFs on PF {pf}: the maximum is {total}", errno=ERANGE)
    what = f"cannot change the number of VFs of PF {pf} from {before} to {count}"
    for vf in _read_vfs(host, pf):
        refuse_if_in_use(host, vf.address, what)
        if vf.use:
            raise HostError(f"{what}: the host uses VF {vf.address}: {vf.use}", "set the VF's interface down", EBUSY)
    try:
        _write_numvfs(host, pf, before, count)
    except HostError as error:
        lost = f" (before: {before}, now: {read_numvfs(host, pf)})" if before else ""
        hint = _NUMVFS_HINTS.get(error.errno, error.hint)
        raise HostError(f"cannot create {count} VFs on PF {pf}{lost}", hint, error.errno) from None
    actual = read_numvfs(host, pf)
    if actual != count:
        raise HostError(f"PF {pf}: requested {count} VFs, kernel created {actual}", "check the kernel log with dmesg")


def _write_numvfs(host: HostRoot, pf: PciAddress, before: int, count: int) -> None:
    # Without probing: otherwise the host's VF driver binds to each VF.
    autoprobe = f"{function_path(pf)}/sriov_drivers_autoprobe"
    probing = host.read(autoprobe)
    host.write(autoprobe, "0")
    try:
        # The kernel changes the number only from or to 0, otherwise EBUSY (sriov_numvfs_store()).
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
        raise HostError(f"cannot parse /{name}: {text!r} is not a number") from None
