"""Virtual functions: making them, giving one its Ethernet address, handing it to vfio-pci.

Order matters (82576 data sheet 7.10.2.9.1; igbvf): PF up, then VFs, then the address, then the driver, which reads it at reset.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.errors import Conflict, HostError
from orchestrator.host.pci import (
    bind_driver,
    read_driver,
    read_iommu_group,
    read_numvfs,
    release_driver,
    reset_function,
    set_numvfs,
)
from orchestrator.host.root import HostRoot
from orchestrator.steps.base import Arguments
from orchestrator.topology import VfState
from orchestrator.values import MacAddress, PciAddress

VFIO = "vfio-pci"
_CARRIER = 30.0


@dataclass(frozen=True)
class CreateVfs:
    """Makes the PF's virtual functions. Existing ones are left as they are: changing their number would destroy them."""

    action: ClassVar[str] = "numvfs"
    pf: PciAddress
    interface: str
    count: int

    def describe(self) -> str:
        """See Step."""
        return f"create {self.count} VFs on {self.pf}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """See Step."""
        return None if read_numvfs(host, self.pf) else {"pf": str(self.pf)}

    def apply(self, host: HostRoot) -> None:
        """See Step."""
        set_numvfs(host, self.pf, self.count)
        _await_carrier(host, self.interface)


@dataclass(frozen=True)
class SetVf:
    """Gives a VF its Ethernet address, through the PF, and takes from it whatever else somebody may have set."""

    action: ClassVar[str] = "vf-mac"  # as in journals of earlier versions
    interface: str
    index: int
    mac: MacAddress

    def describe(self) -> str:
        """See Step."""
        return f"give VF {self.index} of {self.interface} the address {self.mac}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """See Step. There is always something to undo: what others set for the VF while the guest has it."""
        vf = find_vf(host, self.interface, self.index)
        if vf is None:
            raise HostError(f"{self.interface} has no VF {self.index}", "`nohype survey` shows the VFs that exist")
        mac = "" if vf.mac in (None, self.mac) else str(vf.mac)
        return {"interface": self.interface, "index": self.index, "mac": mac}

    def apply(self, host: HostRoot) -> None:
        """See Step."""
        host.net.reset_vf(self.interface, self.index, self.mac)


@dataclass(frozen=True)
class BindVfio:
    """Hands a VF to vfio-pci. One that has vfio-pci already belongs to somebody else, since we give ours back."""

    action: ClassVar[str] = "vf-driver"
    address: PciAddress

    def describe(self) -> str:
        """See Step."""
        return f"bind {self.address} to {VFIO}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """See Step."""
        before = read_driver(host, self.address)
        if before == VFIO:
            raise Conflict(
                f"VF {self.address} is bound to {VFIO} already, and not by us: somebody else may use it",
                f"if nobody does: echo {self.address} > /sys/bus/pci/drivers/{VFIO}/unbind",
            )
        return {"address": str(self.address), "driver": before or ""}

    def apply(self, host: HostRoot) -> None:
        """See Step."""
        check_alone(host, self.address)
        bind_driver(host, self.address, VFIO)


def check_alone(host: HostRoot, address: PciAddress) -> None:
    """A device can be handed over only if its IOMMU group holds nothing else (kernel: Documentation/driver-api/vfio.rst).

    Raises:
        HostError: no IOMMU group, or one with strangers; each is named with its driver.
    """
    group = read_iommu_group(host, address)
    if group is None:
        raise HostError(f"{address} is in no IOMMU group", "switch the IOMMU on in the firmware and with intel_iommu=on")
    strangers = [f"{other} ({read_driver(host, other) or 'no driver'})" for other in group.devices if other != address]
    if strangers:
        raise HostError(
            f"{address} shares IOMMU group {group.number} with {', '.join(strangers)}",
            "a root port with ACS gives each function a group of its own; try another slot",
        )


def undo_numvfs(host: HostRoot, arguments: Arguments) -> None:
    """Removes the VFs that we made."""
    set_numvfs(host, PciAddress.parse(str(arguments["pf"])), 0)


def undo_vf(host: HostRoot, arguments: Arguments) -> None:
    """Makes the PF enforce for the VF what it does for a new one, but for the address that it had; a VF that is gone, as all are
    after a reboot, needs none.
    """
    interface, index, mac = str(arguments["interface"]), int(str(arguments["index"])), str(arguments["mac"])
    if find_vf(host, interface, index):
        host.net.reset_vf(interface, index, MacAddress.parse(mac) if mac else None)


def undo_vf_driver(host: HostRoot, arguments: Arguments) -> None:
    """Resets the VF and gives it back to the driver it had; a VF that is gone needs none.

    Raises:
        HostError: besides what the kernel refuses, if the VF can't be reset: what its last user left in it would reach the next.
    """
    address = PciAddress.parse(str(arguments["address"]))
    if host.exists(f"sys/bus/pci/devices/{address}"):
        clean = reset_function(host, address)
        release_driver(host, address, str(arguments["driver"]) or None)
        if not clean:
            # SR-IOV 2.2.2 demands it of each VF.
            raise HostError(f"VF {address} has no reset of its own", "a driver of the host may reset it: bind it once")


def _await_carrier(host: HostRoot, interface: str) -> None:
    """Making VFs resets the NIC. Until its link is back, the VFs' mailbox does not answer ("PF still in reset")."""
    deadline = time.monotonic() + _CARRIER
    while host.read(f"sys/class/net/{interface}/operstate") != "up":
        if time.monotonic() > deadline:
            raise HostError(
                f"{interface} has no carrier {_CARRIER:g} s after its VFs were made", "is the cable in, and the switch on?"
            )
        time.sleep(0.1)


def find_vf(host: HostRoot, interface: str, index: int) -> VfState | None:
    """What a PF enforces for its VF; None if there is no such interface or VF."""
    return next((vf for link in host.net.read_links() if link.name == interface for vf in link.vfs if vf.index == index), None)
