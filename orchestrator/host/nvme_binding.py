"""Takes an NVMe controller from the host, gives it to a guest (vfio-pci), and back. Each function is idempotent.

A disk that the manager owns may contain what a guest has written, so udev must not examine it: the host would activate LVM, RAID
and file systems of the guest. A udev rule of the host role excludes controllers whose driver_override is "nvme". A reboot loses
the override, so the rule also excludes controllers whose serial number has a file in RESERVED.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from errno import EBUSY

from orchestrator.errors import HostError
from orchestrator.host.block import BLOCK, claim_device
from orchestrator.host.disk_use import find_users
from orchestrator.host.iommu import check_alone
from orchestrator.host.nvme import LIVE, NVME, read_controller, read_controllers, read_identified, read_state
from orchestrator.host.nvme_admin import read_namespace_ids
from orchestrator.host.pci import VFIO, bind_driver, read_override, release_driver
from orchestrator.host.root import HostRoot
from orchestrator.host.sync import sync_path
from orchestrator.model.topology import NvmeController
from orchestrator.values import PciAddress
from orchestrator.waiting import wait_until

RESERVED = "var/lib/nohype/reserved-disks"  # files nvme-SERIAL with the PCI address
# $attr{serial} of udev has only these characters (src/shared/udev-util.c, UDEV_ALLOWED_CHARS_INPUT), without "/" here.
_UNSAFE = re.compile(r"[^0-9A-Za-z#+.:=@_ $%?,-]", re.ASCII)
# The driver sets up a controller and lists its namespaces after it was bound. CAP.TO allows up to 127.5 s for the first part.
_READY_TIMEOUT = 150.0  # seconds


def reserve_controller(host: HostRoot, address: PciAddress, serial: str) -> NvmeController:
    """Marks the controller as the manager's, and returns it. It stays bound to nvme.

    Raises HostError: EBUSY if the host uses it; another serial number; shared namespaces, or inactive ones, which a guest could
    activate; the controller cannot be passed through. The contents are not checked: `host.signatures`.
    """
    controller = read_identified(host, address, serial)
    check_alone(host, address)
    _check_unused(host, controller)
    _, inactive = read_namespace_ids(host, controller)
    if inactive:
        what = f"NVMe controller {address} ({serial}) has inactive namespaces: {', '.join(map(str, inactive))}"
        raise HostError(what, "delete them with `nvme delete-ns`, or attach them with `nvme attach-ns`")
    _write_mark(host, address, serial)
    bind_driver(host, address, NVME)
    return controller


def detach_controller(host: HostRoot, address: PciAddress, serial: str) -> None:
    """Binds the controller to vfio-pci. Raises HostError: EBUSY if the host uses it, or another serial number."""
    if read_controller(host, address).driver == VFIO:
        return bind_driver(host, address, VFIO)
    controller = read_identified(host, address, serial)
    check_alone(host, address)
    _check_unused(host, controller)
    with ExitStack() as claims:
        # A claim refuses a mount between the check and the removal of the block devices. It does not delay the removal.
        for namespace in controller.namespaces:
            claims.enter_context(claim_device(host, namespace.device))
        bind_driver(host, address, VFIO)


def return_controller(host: HostRoot, address: PciAddress, serial: str) -> NvmeController:
    """Binds the controller to nvme, marked as the manager's, and waits until its namespaces are block devices.

    Raises HostError: EBUSY if a guest uses it; another serial number; the controller is not ready after 150 s.
    """
    bind_driver(host, address, NVME)
    wait_until(lambda: _is_ready(host, address), timeout=_READY_TIMEOUT, interval=0.1)
    return read_identified(host, address, serial)


def release_controller(host: HostRoot, address: PciAddress) -> None:
    """Gives the controller back to the host: bound to nvme, without a mark. It must have been erased."""
    release_driver(host, address, NVME)
    _remove_marks(host, address=address)
    for namespace in read_controller(host, address).namespaces:
        try:
            # udev examines it again, and creates its links in /dev/disk (Documentation/ABI/testing/sysfs-uevent).
            host.write(f"{BLOCK}/{namespace.device}/uevent", "change")
        except HostError:
            pass  # the links are missing until the next event; the controller itself is released


def remove_mark(host: HostRoot, serial: str) -> None:
    """For a disk that is gone. It must have been erased, or never handed over. No-op without a mark."""
    _remove_marks(host, _mark_name(serial))


def find_reserved(host: HostRoot) -> tuple[str, ...]:
    """The block devices of controllers that are marked as the manager's: a guest may have written them."""
    found: list[str] = []
    for controller in read_controllers(host):
        mark = host.path / RESERVED / _mark_name(controller.serial or "")
        if read_override(host, controller.address) == NVME or mark.exists():
            found += [namespace.device for namespace in controller.namespaces]
    return tuple(found)


def _mark_name(serial: str) -> str:
    return f"nvme-{_UNSAFE.sub('_', serial)}"


def _write_mark(host: HostRoot, address: PciAddress, serial: str) -> None:
    file = host.path / RESERVED / _mark_name(serial)
    try:
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with file.open("w") as mark:
            mark.write(f"{address}\n")
            mark.flush()
            os.fsync(mark.fileno())
        sync_path(file.parent)
    except OSError as error:
        raise HostError(f"cannot write {file}", f"check free space and rights of {file.parent}", error.errno or 0) from None


def _remove_marks(host: HostRoot, name: str = "", address: PciAddress | None = None) -> None:
    """The mark with this name, or those of the address."""
    folder = host.path / RESERVED
    try:
        for file in sorted(folder.glob("nvme-*")):
            if file.name == name or file.read_text().strip() == str(address):
                file.unlink()
        if folder.exists():
            sync_path(folder)
    except OSError as error:
        raise HostError(f"cannot remove a file in {folder}", f"check the rights of {folder}", error.errno or 0) from None


def _check_unused(host: HostRoot, controller: NvmeController) -> None:
    users = find_users(host, controller)
    if users:
        what = f"NVMe controller {controller.address} ({controller.serial}) is used by the host ({'; '.join(users)})"
        raise HostError(what, "end this use, or choose another disk", EBUSY)


def _is_ready(host: HostRoot, address: PciAddress) -> bool:
    """The driver shows a block device for each active namespace, which a guest may have changed."""
    controller = read_controller(host, address)
    if controller.driver != NVME or read_state(host, controller) != LIVE:
        return False
    try:
        active, _ = read_namespace_ids(host, controller)
    except HostError:
        return False
    return set(active) == {namespace.nsid for namespace in controller.namespaces}
