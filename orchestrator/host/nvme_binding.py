"""Takes an NVMe controller from the host, gives it to a guest (vfio-pci), and back. Each function is idempotent.

While the manager owns a controller that is bound to nvme, its driver_override is "nvme". A udev rule of the host role then keeps
udev from examining the contents, which a guest may have written: LVM and RAID would be activated on the host.
"""

from __future__ import annotations

from contextlib import ExitStack
from errno import EBUSY

from orchestrator.errors import HostError
from orchestrator.host.block import claim_device
from orchestrator.host.disk_use import find_users
from orchestrator.host.iommu import check_alone
from orchestrator.host.nvme import LIVE, NVME, read_controller, read_identified, read_state
from orchestrator.host.nvme_admin import read_namespace_ids
from orchestrator.host.pci import VFIO, bind_driver, release_driver
from orchestrator.host.root import HostRoot
from orchestrator.model.topology import NvmeController
from orchestrator.values import PciAddress
from orchestrator.waiting import wait_until

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
