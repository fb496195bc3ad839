"""NVMe controllers of the PCI bus and their namespaces (drivers/nvme/host/sysfs.c, Documentation/ABI/stable/sysfs-block)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from errno import ENODEV

from orchestrator.errors import HostError
from orchestrator.host.block import is_read_only, read_size
from orchestrator.host.iommu import read_group_number
from orchestrator.host.pci import function_path, has_function, is_idle_nvme, is_nvme, read_driver, read_functions
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import NvmeController, NvmeNamespace
from orchestrator.values import PciAddress

NVME, LIVE = "nvme", "live"
_SUBSYSTEMS = "sys/class/nvme-subsystem"
# drivers/nvme/host/core.c, nvme_alloc_ns(): nvmeXn1, and with native multipath the hidden path nvmeXcYn1 of the disk nvmeXn1.
_NAMESPACE = re.compile(r"(nvme\d+)(?:c\d+)?(n\d+)", re.ASCII)
# A key of claims, and a word of the configuration. NVMe base specification, Identify Controller: 20 bytes of ASCII.
_SERIAL = re.compile(r"[!-~](?:[ -~]{0,18}[!-~])?", re.ASCII)


def read_controllers(host: HostRoot) -> tuple[NvmeController, ...]:
    """All NVMe controllers by address. If one cannot be read, or cannot be given to a guest, its `fault` has the reason.

    `fault` does not tell whether the host uses the controller.
    """
    found = [_try_controller(host, address) for address in sorted(read_functions(host)) if _seems_nvme(host, address)]
    counts = Counter(controller.serial for controller in found if controller.serial)
    return tuple(_check_serial(controller, counts) for controller in found)


def read_controller(host: HostRoot, address: PciAddress) -> NvmeController:
    """Raises HostError if the function does not exist or is not an NVMe controller (ENODEV), or cannot be read."""
    if not has_function(host, address):
        raise HostError(f"NVMe controller {address} does not exist", "check the address with `nohype survey`", ENODEV)
    if not is_nvme(host, address):
        raise HostError(f"{address} is not an NVMe controller", "check the address with `nohype survey`", ENODEV)
    driver = read_driver(host, address)
    controller = NvmeController(
        address, None, None, None, _read_node(host, address), driver, read_group_number(host, address),
        fault="" if is_idle_nvme(host, address) else "it has SR-IOV virtual functions",
    )  # fmt: skip
    name = _find_name(host, address) if driver == NVME else None
    if name is None:
        missing = "the driver nvme has not set it up: check the kernel log with dmesg"
        return replace(controller, fault=controller.fault or missing) if driver == NVME else controller
    folder = f"{function_path(address)}/nvme/{name}"
    namespaces = tuple(sorted(_read_namespaces(host, folder), key=lambda namespace: namespace.nsid))
    return replace(
        controller,
        name=name,
        serial=host.read(f"{folder}/serial"),
        model="".join(char if char.isprintable() else "?" for char in host.read(f"{folder}/model")),
        namespaces=namespaces,
        fault=controller.fault or _describe_fault(host, folder, name, namespaces),
    )


def find_block_devices(host: HostRoot, address: PciAddress) -> tuple[str, ...]:
    """The host's block devices that are namespaces of the controller, whatever its driver is."""
    folder = f"{function_path(address)}/nvme"
    names = host.names(folder) if host.exists(folder) else ()
    found = {name for controller in names for name in host.names(f"{folder}/{controller}")}
    return tuple(sorted(name for name in found if _NAMESPACE.fullmatch(name)))


def read_identified(host: HostRoot, address: PciAddress, serial: str) -> NvmeController:
    """The controller, bound to the driver nvme. Raises HostError if it has another serial number, or is not ready for use."""
    controller = read_controller(host, address)
    what = f"NVMe controller {address}"
    if controller.driver != NVME:
        raise HostError(f"{what}: bound driver {controller.driver or 'none'}, expected {NVME}", f"`modprobe {NVME}`", ENODEV)
    if controller.serial is not None and controller.serial != serial:
        hint = "the disks were exchanged: check them with `nohype survey`"
        raise HostError(f"{what}: serial number {controller.serial}, expected {serial}", hint, ENODEV)
    if controller.fault:
        raise HostError(f"{what}: {controller.fault}", "check the kernel log with dmesg, and the disk with `nvme list -v`")
    return controller


def read_state(host: HostRoot, controller: NvmeController) -> str | None:
    """ "live", "connecting", "dead", ...: nvme_sysfs_show_state(). None unless the driver nvme is bound."""
    return host.find(f"{function_path(controller.address)}/nvme/{controller.name}/state") if controller.name else None


def _try_controller(host: HostRoot, address: PciAddress) -> NvmeController:
    try:
        return read_controller(host, address)
    except HostError as error:
        return NvmeController(address, None, None, None, None, None, None, fault=f"cannot be read: {error.message}")


def _seems_nvme(host: HostRoot, address: PciAddress) -> bool:
    # A function whose class cannot be read is listed if the driver nvme has bound it.
    try:
        return is_nvme(host, address)
    except HostError:
        return host.exists(f"{function_path(address)}/nvme")


def _check_serial(controller: NvmeController, counts: Counter[str]) -> NvmeController:
    serial = controller.serial
    if controller.fault or serial is None:
        return controller
    if not _SERIAL.fullmatch(serial):
        return replace(controller, fault=f"its serial number {serial!r} is empty or not printable ASCII")
    if counts[serial] > 1:
        return replace(controller, fault=f"{counts[serial]} controllers have the serial number {serial}")
    return controller


def _read_node(host: HostRoot, address: PciAddress) -> int | None:
    text = host.find(f"{function_path(address)}/numa_node") or "-1"
    try:
        return int(text) if int(text) >= 0 else None
    except ValueError:
        raise HostError(f"cannot parse /{function_path(address)}/numa_node: {text!r}") from None


def _find_name(host: HostRoot, address: PciAddress) -> str | None:
    # nvme_init_ctrl() names the controller during the probe of the driver.
    folder = f"{function_path(address)}/nvme"
    names = [name for name in host.names(folder) if re.fullmatch(r"nvme\d+", name, re.ASCII)] if host.exists(folder) else []
    return names[0] if names else None


def _read_namespaces(host: HostRoot, folder: str) -> Iterator[NvmeNamespace]:
    for name in host.names(folder):
        match = _NAMESPACE.fullmatch(name)
        if match:
            device = match[1] + match[2]
            yield NvmeNamespace(_read_nsid(host, device), device, *read_size(host, device))


def _read_nsid(host: HostRoot, device: str) -> int:
    name = f"sys/class/block/{device}/nsid"
    text = host.read(name)
    if not text.isdecimal():
        raise HostError(f"cannot parse /{name}: {text!r} is not a number")
    return int(text)


def _describe_fault(host: HostRoot, folder: str, name: str, namespaces: tuple[NvmeNamespace, ...]) -> str:
    state = host.find(f"{folder}/state")
    if state not in (None, LIVE):
        return f"its state is {state}, expected {LIVE}"
    if not namespaces:
        return "it has no namespace"
    protected = [namespace.device for namespace in namespaces if is_read_only(host, namespace.device)]
    if protected:
        return f"{', '.join(protected)} cannot be written"
    others = [other for other in _read_siblings(host, name) if other != name]
    return f"its namespaces can also be reached through {', '.join(others)}" if others else ""


def _read_siblings(host: HostRoot, name: str) -> tuple[str, ...]:
    # Controllers of one subsystem (a disk with two ports) share namespaces. The subsystem links to each of its controllers:
    # nvme_init_subsystem().
    for subsystem in host.names(_SUBSYSTEMS) if host.exists(_SUBSYSTEMS) else ():
        names = [other for other in host.names(f"{_SUBSYSTEMS}/{subsystem}") if re.fullmatch(r"nvme\d+", other, re.ASCII)]
        if name in names:
            return tuple(names)
    return ()
