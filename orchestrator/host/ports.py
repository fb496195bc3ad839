"""The network interfaces of a PCI function: the uplink and, in switchdev mode, representors of VFs and subfunctions (below the PF
since Linux 5.8), a second port, or IPoIB children. Interfaces in other network namespaces are not visible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from errno import EINVAL, ENODEV, ENOENT, EOPNOTSUPP

from orchestrator.errors import HostError, RequestError
from orchestrator.host.pci import DEVICES, function_path
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import Port
from orchestrator.values import MacAddress, PciAddress

_LAST = 1 << 31
_IFF_UP = 1  # include/uapi/linux/if.h
_ARPHRD_ETHER, _ARPHRD_INFINIBAND = 1, 32  # include/uapi/linux/if_arp.h
# "pf0vf3", "c1pf0vf3", "pf0sf88", "pf0": devlink flavours PCI_VF, PCI_SF, PCI_PF (net/devlink/port.c,
# __devlink_port_phys_port_name_get); sfc adds its own port in front ("p0pf0vf3"). The PF's own port is "p0" or "p0s1".
_REPRESENTOR = re.compile(r"(?:p\d+)?(?:c\d+)?pf\d+(?:(?:vf|sf)\d+)?", re.ASCII)
# Documentation/networking/operstates.rst: for "unknown" (the driver does not report it) and "dormant" (waits for 802.1X) only the
# carrier counts.
_WORKING = ("up", "unknown", "dormant")


def read_ports(host: HostRoot, pci: PciAddress) -> tuple[Port, ...]:
    """All visible interfaces, the function's most likely own one first. If one is not usable, its `fault` has the reason."""
    folder = f"{function_path(pci)}/net"
    names = host.names(folder) if host.exists(folder) else ()
    ports = [_read_port(host, f"{folder}/{name}", name) for name in names]
    return tuple(sorted(ports, key=lambda port: (bool(port.fault), _read_index(host, f"{folder}/{port.name}"), port.name)))


def find_port(host: HostRoot, pci: PciAddress, known: Sequence[str] = (), *, odd: bool = False) -> str:
    """The current name of a function's own interface. Raises HostError if there is none (ENODEV) or the choice is ambiguous.

    Args:
        known: expected names, from plan or configuration; used only if there are several interfaces.
        odd: accept a single interface even if it cannot be an uplink, for reading VFs or an undo, which only need a name.
    """
    every = read_ports(host, pci)
    ports = [port for port in every if not port.fault]
    if odd and not ports and len(every) == 1 and not every[0].representor:
        return every[0].name
    if len(ports) == 1:
        return ports[0].name
    for name in known:
        if any(port.name == name for port in ports):
            return name
    if ports:
        names = ", ".join(port.name for port in ports)
        raise HostError(f"{pci} has several network interfaces ({names})", "list its uplink in [host] uplinks", EINVAL)
    raise HostError(f"{pci} has no network interface: {describe_absence(host, pci)}", "check with `nohype survey`", ENODEV)


def find_function(host: HostRoot, interface: str) -> PciAddress | None:
    names = [name for name in host.names(DEVICES) if host.exists(f"{DEVICES}/{name}/net/{interface}")]
    return PciAddress.parse(names[0]) if names else None


def find_device(host: HostRoot, interface: str) -> str | None:
    """The device of an interface on any bus (for PCI the address), None for a virtual interface."""
    return host.link(f"sys/class/net/{interface}/device")


def has_port(host: HostRoot, pci: PciAddress, interface: str) -> bool:
    return host.exists(f"{function_path(pci)}/net/{interface}")


def describe_absence(host: HostRoot, pci: PciAddress) -> str:
    folder = function_path(pci)
    if not host.exists(folder):
        return "the PCI function does not exist"
    driver = host.link(f"{folder}/driver")
    if driver is None:
        return "no driver is bound"
    if not host.exists(f"{folder}/net"):
        return f"driver {driver} creates none"
    faults = [port.fault for port in read_ports(host, pci) if port.fault]
    # sysfs shows only interfaces of its own network namespace; the folder stays (net/core/net-sysfs.c, net_class.namespace).
    return "; ".join(faults) or "it is in another network namespace"


def read_up(host: HostRoot, pci: PciAddress, interface: str) -> bool:
    """Administratively up with carrier; False if the function does not have the interface."""
    return has_port(host, pci, interface) and _read_up(host, f"{function_path(pci)}/net/{interface}")


def has_carrier(host: HostRoot, pci: PciAddress) -> bool:
    """Whether any interface of a function is administratively up and has carrier."""
    folder = f"{DEVICES}/{pci}/net"
    return host.exists(folder) and any(_read_up(host, f"{folder}/{name}") for name in host.names(folder))


def describe_use(host: HostRoot, folder: str, interface: str) -> str:
    """Empty if the host does not use the interface. IP addresses are not in sysfs: see `Net.read_addressed`."""
    try:
        names, flags = host.names(folder), host.find(f"{folder}/flags")
        if master := host.link(f"{folder}/master"):
            return f"its interface {interface} is a port of {master}"
        # netdev_adjacent_sysfs_add(): macvlan, macvtap, VLAN and team devices on top of the interface
        if upper := [name.removeprefix("upper_") for name in names if name.startswith("upper_")]:
            return f"{', '.join(upper)} {'uses' if len(upper) == 1 else 'use'} its interface {interface}"
        up = int(flags, 0) & _IFF_UP if flags else host.find(f"{folder}/operstate") == "up"
        return f"its interface {interface} is up" if up else ""
    except (HostError, ValueError) as error:
        return f"its interface {interface} cannot be read: {error}"


def _read_port(host: HostRoot, folder: str, name: str) -> Port:
    try:
        kind, address = int(host.find(f"{folder}/type") or _ARPHRD_ETHER), host.find(f"{folder}/address") or ""
        port_name = _read_port_name(host, folder)
        mac = _parse_mac(address)
        representor = bool(_REPRESENTOR.fullmatch(port_name))
        fault = ""
        if kind == _ARPHRD_INFINIBAND:
            fault = f"{name} is an InfiniBand interface (address {address}), not Ethernet"
        elif kind != _ARPHRD_ETHER:
            fault = f"{name} is not an Ethernet interface (type {kind})"
        elif representor:
            fault = f"{name} is a representor (phys_port_name {port_name}), not the PF's own port"
        elif mac is None:
            fault = f"{name} has address {address or 'none'}, which is not a unicast Ethernet address"
        return Port(name, _read_up(host, folder), mac, fault, representor)
    except (HostError, ValueError) as error:
        return Port(name, up=False, mac=None, fault=f"{name} cannot be read: {getattr(error, 'message', error)}")


def _read_port_name(host: HostRoot, folder: str) -> str:
    # The file cannot be read if the driver does not have a port name.
    try:
        return host.find(f"{folder}/phys_port_name") or ""
    except HostError as error:
        if error.errno not in (EOPNOTSUPP, EINVAL, ENODEV):
            raise
        return ""


def _read_index(host: HostRoot, folder: str) -> int:
    # The oldest first: representors and children are created after the PF's own interface.
    try:
        return int(host.find(f"{folder}/ifindex") or _LAST)
    except (HostError, ValueError):
        return _LAST


def _read_up(host: HostRoot, folder: str) -> bool:
    # The file `carrier` of an interface that is down cannot be read (EINVAL).
    try:
        return host.read(f"{folder}/operstate") in _WORKING and host.read(f"{folder}/carrier") == "1"
    except HostError as error:
        if error.errno not in (EINVAL, ENOENT):
            raise
        return False


def _parse_mac(text: str) -> MacAddress | None:
    try:
        return MacAddress.parse(text)
    except RequestError:
        return None


def read_mtu(host: HostRoot, interface: str) -> int | None:
    """Bytes of payload of a frame; None if the interface does not exist in this network namespace."""
    text = host.find(f"sys/class/net/{interface}/mtu")
    return int(text) if text and text.isdigit() else None
