"""Virtual functions: making them, giving one its Ethernet address, handing it to vfio-pci.

Order matters (82576 data sheet 7.10.2.9.1; igbvf): PF up, then VFs, then the address, then the driver, which reads it at reset.
A VF is known by its PF's PCI address and its number. Each step and each undo looks first whether the kernel agrees on the VF's
own address: addresses and names of interfaces that were computed or stored may be another function's by now.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.errors import Conflict, HostError
from orchestrator.host.iommu import check_alone
from orchestrator.host.pci import (
    VFIO,
    bind_driver,
    has_function,
    is_pf,
    read_driver,
    read_override,
    release_driver,
    reset_function,
)
from orchestrator.host.ports import find_function, find_port, has_carrier, read_up
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import check_gone, check_vf, find_vf, is_vf, read_numvfs, read_use, set_numvfs
from orchestrator.model.plan import VfPlan
from orchestrator.resources.nic_settings import clear_vf, read_vf_state, restore_vf, state_from_json, state_to_json
from orchestrator.resources.step import Arguments
from orchestrator.values import PciAddress

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
        return None if read_numvfs(host, self.pf) else {"pf": str(self.pf), "count": self.count}

    def apply(self, host: HostRoot) -> None:
        """See Step."""
        set_numvfs(host, self.pf, self.count)
        _await_carrier(host, self.pf, find_port(host, self.pf, [self.interface]))


@dataclass(frozen=True)
class SetVf:
    """Gives a VF its Ethernet address, through the PF, and takes from it whatever else was set for it."""

    action: ClassVar[str] = "vf-mac"  # as in journals of earlier versions
    vf: VfPlan

    def describe(self) -> str:
        """See Step."""
        return f"give VF {self.vf.index} of {self.vf.interface} the address {self.vf.mac}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """See Step. There is always something to undo: what others set for the VF while the guest has it."""
        check_vf(host, self.vf.pf, self.vf.index, self.vf.address)
        interface = find_port(host, self.vf.pf, [self.vf.interface])
        state = read_vf_state(host, interface, self.vf.index)
        if state is None:
            what = f"cannot read what {interface} enforces for its VF {self.vf.index}"
            raise HostError(what, f"the driver of PF {self.vf.pf} does not tell: its VFs cannot be guests'")
        before = state_to_json(state)
        return {"pf": str(self.vf.pf), "interface": interface, "index": self.vf.index, **before}

    def apply(self, host: HostRoot) -> str:
        """See Step."""
        check_vf(host, self.vf.pf, self.vf.index, self.vf.address)
        return clear_vf(host, find_port(host, self.vf.pf, [self.vf.interface]), self.vf.index, self.vf.mac)


@dataclass(frozen=True)
class BindVfio:
    """Hands a VF to vfio-pci. One that has vfio-pci already was bound outside the manager, since we give ours back."""

    action: ClassVar[str] = "vf-driver"
    vf: VfPlan

    def describe(self) -> str:
        """See Step."""
        return f"bind {self.vf.address} to {VFIO}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """See Step."""
        address = self.vf.address
        check_vf(host, self.vf.pf, self.vf.index, address)
        before = read_driver(host, address)
        if before == VFIO:
            raise Conflict(
                f"VF {address} is bound to {VFIO} already, and was not bound by the manager: another program may use it",
                f"if none does: echo {address} > /sys/bus/pci/drivers/{VFIO}/unbind",
            )
        if use := read_use(host, address):
            raise Conflict(
                f"the host uses VF {address}: {use}", "set its interface down and take it out of bonds, bridges and namespaces"
            )
        return {
            "address": str(address), "driver": before or "", "override": read_override(host, address),
            "pf": str(self.vf.pf), "index": self.vf.index,
        }  # fmt: skip

    def apply(self, host: HostRoot) -> None:
        """See Step."""
        check_vf(host, self.vf.pf, self.vf.index, self.vf.address)
        check_alone(host, self.vf.address)
        bind_driver(host, self.vf.address, VFIO)


def undo_numvfs(host: HostRoot, arguments: Arguments) -> None:
    """Removes the VFs that we made. With the PF its VFs are gone; another number of VFs than ours was made by others since.

    Removing VFs resets the NIC too. If an interface of the PF had carrier before, this waits until one has it
    again: a request that follows would be refused because the uplink is down.
    """
    pf = PciAddress.parse(str(arguments["pf"]))
    if not has_function(host, pf):
        return
    if read_numvfs(host, pf) == arguments.get("count", read_numvfs(host, pf)):
        had_carrier = has_carrier(host, pf)
        set_numvfs(host, pf, 0)
        deadline = time.monotonic() + _CARRIER
        while had_carrier and not has_carrier(host, pf) and time.monotonic() < deadline:
            time.sleep(0.1)


def undo_vf(host: HostRoot, arguments: Arguments) -> str:
    """Makes the PF enforce for the VF what it did before it was a guest's. A VF that the kernel no longer has, as all after a
    reboot, needs none; a PF that cannot be reached is an error.

    Args:
        arguments: those of earlier versions have no PF, but its interface's name; and of what was before, the address alone.
            ``address`` is the VF's own, where that is known.

    Returns:
        What could not be put back, in words.

    Raises:
        HostError: the PF's interface cannot be found, or its driver leaves the VF with the guest's address.
    """
    interface, index = str(arguments["interface"]), int(str(arguments["index"]))
    pf = PciAddress.parse(str(arguments["pf"])) if "pf" in arguments else find_function(host, interface)
    if pf is None:
        what = f"cannot put VF {index} of {interface} back: there is no interface {interface}"
        raise HostError(what, "it has another name now, or was moved to another network namespace: ip link show, ip netns list")
    if find_vf(host, pf, index) is None:
        if "address" in arguments:
            check_gone(host, pf, index, PciAddress.parse(str(arguments["address"])))
        return ""
    return restore_vf(host, find_port(host, pf, [interface], odd=True), state_from_json(index, arguments))


def undo_vf_driver(host: HostRoot, arguments: Arguments) -> None:
    """Resets the VF and gives it back to the driver it had; a VF that the kernel no longer has needs none.

    Raises:
        HostError: besides what the kernel refuses, if the function is no VF, or if it can't be reset: what its last user left in
            it would reach the next.
    """
    address = PciAddress.parse(str(arguments["address"]))
    if "pf" in arguments:
        pf, index = PciAddress.parse(str(arguments["pf"])), int(str(arguments["index"]))
        check_gone(host, pf, index, address)
        if find_vf(host, pf, index) != address:
            return  # the PF's VFs were made anew: what is at this address now was never bound by us
    if not is_vf(host, address) and not is_pf(host, address):
        return
    clean = reset_function(host, address)
    release_driver(host, address, str(arguments["driver"]) or None, str(arguments.get("override", "")))
    if not clean:
        # SR-IOV 2.2.2 demands it of each VF.
        raise HostError(f"VF {address} has no reset of its own", "a driver of the host may reset it: bind it once")


def _await_carrier(host: HostRoot, pf: PciAddress, interface: str) -> None:
    """Making VFs resets the NIC. Until its link is back, the VFs' mailbox does not answer ("PF still in reset")."""
    deadline = time.monotonic() + _CARRIER
    while not read_up(host, pf, interface):
        if time.monotonic() > deadline:
            raise HostError(
                f"{interface} has no carrier {_CARRIER:g} s after its VFs were made", "is the cable in, and the switch on?"
            )
        time.sleep(0.1)
