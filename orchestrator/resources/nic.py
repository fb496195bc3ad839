"""A guest's NICs: VFs that are created, configured, passed through, watched and cleaned up.

Order matters (82576 data sheet 7.10.2.9.1; igbvf): PF up, then VFs, then the address, then the driver, which reads it at reset.
A VF is identified by its PF's PCI address and its number. Each step and undo first checks the VF's own address: an address or
interface name that was computed or stored may belong to another function by now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from xml.etree.ElementTree import Element

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
from orchestrator.hypervisor.connection import Pinning
from orchestrator.model.plan import Plan, VfPlan
from orchestrator.model.topology import VfState
from orchestrator.resources.nic_settings import configure_vf, read_vf_state, restore_vf, state_from_json, state_to_json
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments
from orchestrator.resources.tap import build_interface, diff_interfaces
from orchestrator.resources.xml import element
from orchestrator.values import PciAddress
from orchestrator.waiting import wait_until

CARRIER_SECONDS = 30.0
_FIRST_SLOT = 2
"""PCI slot of a guest's first NIC; the others follow. A guest numbers its interfaces in this order."""


@dataclass(frozen=True)
class VfsBefore:
    """A PF without VFs, and the number to create; None in records of earlier versions."""

    pf: PciAddress
    count: int | None = None


@dataclass(frozen=True)
class VfBefore:
    """A VF with its settings. Earlier versions recorded neither ``pf`` nor ``address``."""

    interface: str
    index: int
    pf: PciAddress | None = None
    address: PciAddress | None = None


@dataclass(frozen=True)
class DriverBefore:
    """Driver and driver override of a VF, empty if it has none. Earlier versions recorded neither ``pf`` nor ``index``."""

    address: PciAddress
    driver: str
    override: str = ""
    pf: PciAddress | None = None
    index: int | None = None


@register
@dataclass(frozen=True)
class CreateVfs:
    """For a PF without VFs: the number of existing VFs cannot be changed without destroying them."""

    action: ClassVar[str] = "numvfs"
    pf: PciAddress
    interface: str
    count: int

    def describe(self) -> str:
        return f"create {self.count} VFs on {self.pf}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        return None if read_numvfs(host, self.pf) else to_arguments(VfsBefore(self.pf, self.count))

    def apply(self, host: HostRoot) -> None:
        set_numvfs(host, self.pf, self.count)
        _wait_for_carrier(host, self.pf, find_port(host, self.pf, [self.interface]))

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op if the PF is gone, or has another number of VFs than were created.

        Removing VFs resets the NIC. If the PF had carrier before, this waits for it: later requests would be refused because the
        uplink is down.
        """
        host, before = context.host, parse_arguments(VfsBefore, arguments)
        pf = before.pf
        if has_function(host, pf) and before.count in (None, read_numvfs(host, pf)):
            had_carrier = has_carrier(host, pf)
            set_numvfs(host, pf, 0)
            if had_carrier:
                wait_until(lambda: has_carrier(host, pf), timeout=CARRIER_SECONDS, interval=0.1)


@register
@dataclass(frozen=True)
class ConfigureVf:
    """Sets a VF's Ethernet address, port VLAN and rate, through the PF, and its other settings to their defaults."""

    action: ClassVar[str] = "vf-mac"  # as in journals of earlier versions
    vf: VfPlan

    def describe(self) -> str:
        vlan = f", port VLAN {self.vf.vlan}" if self.vf.vlan else ""
        rate = f", at most {self.vf.rate} Mbit/s" if self.vf.rate else ""
        return f"give VF {self.vf.index} of {self.vf.interface} the address {self.vf.mac}{vlan}{rate}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        # Never None: settings that other programs change while the guest owns the VF are undone too.
        check_vf(host, self.vf.pf, self.vf.index, self.vf.address)
        interface = find_port(host, self.vf.pf, [self.vf.interface])
        state = read_vf_state(host, interface, self.vf.index)
        if state is None:
            message = f"cannot read the settings of VF {self.vf.index} from {interface}"
            raise HostError(message, f"take the uplink out of [host] uplinks: the driver of PF {self.vf.pf} does not report them")
        return {**to_arguments(VfBefore(interface, self.vf.index, self.vf.pf, self.vf.address)), **state_to_json(state)}

    def apply(self, host: HostRoot) -> str:
        check_vf(host, self.vf.pf, self.vf.index, self.vf.address)
        return configure_vf(host, find_port(host, self.vf.pf, [self.vf.interface]), self.vf)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> str:
        """No-op if the VF is gone, as after a reboot.

        Raises HostError if the PF has no interface, or its driver leaves the guest's address on the VF.
        """
        host, arguments = context.host, _complete(context, arguments)
        before = parse_arguments(VfBefore, arguments)
        pf, index = before.pf or find_function(host, before.interface), before.index
        if pf is None:
            raise HostError(
                f"cannot restore VF {index} of {before.interface}: there is no interface {before.interface}",
                "check whether it was renamed or moved to another network namespace: ip link show, ip netns list",
            )
        if find_vf(host, pf, index) is None:
            if before.address:
                check_gone(host, pf, index, before.address)
            return ""
        return restore_vf(host, find_port(host, pf, [before.interface], odd=True), state_from_json(index, arguments))


@register
@dataclass(frozen=True)
class BindVfio:
    """The manager unbinds its VFs: a VF that is already bound to vfio-pci was bound by another program."""

    action: ClassVar[str] = "vf-driver"
    vf: VfPlan

    def describe(self) -> str:
        return f"bind {self.vf.address} to {VFIO}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        address = self.vf.address
        check_vf(host, self.vf.pf, self.vf.index, address)
        before = read_driver(host, address)
        if before == VFIO:
            raise Conflict(
                f"VF {address} is bound to {VFIO}, but not by the manager",
                f"if no program uses it: echo {address} > /sys/bus/pci/drivers/{VFIO}/unbind",
            )
        if use := read_use(host, address):
            raise Conflict(
                f"the host uses VF {address}: {use}", "set its interface down and take it out of bonds, bridges and namespaces"
            )
        return to_arguments(DriverBefore(address, before or "", read_override(host, address), self.vf.pf, self.vf.index))

    def apply(self, host: HostRoot) -> None:
        check_vf(host, self.vf.pf, self.vf.index, self.vf.address)
        check_alone(host, self.vf.address)
        bind_driver(host, self.vf.address, VFIO)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """Resets the VF and restores its driver; no-op if the VF is gone.

        Raises HostError if the kernel refuses, the function is not a VF, or it cannot be reset: its state could leak.
        """
        host, arguments = context.host, _complete(context, arguments)
        before = parse_arguments(DriverBefore, arguments)
        address = before.address
        if before.pf and before.index is not None:
            check_gone(host, before.pf, before.index, address)
            if find_vf(host, before.pf, before.index) != address:
                return  # the PF's VFs were created again: the manager has not bound the VF that now has this address
        if not is_vf(host, address) and not is_pf(host, address):
            return
        clean = reset_function(host, address)
        release_driver(host, address, before.driver or None, before.override)
        if not clean:
            # SR-IOV 2.2.2 requires a reset of each VF.
            raise HostError(f"VF {address} cannot be reset (no sysfs reset)", "bind it once to a host driver, which may reset it")


def _complete(context: UndoContext, arguments: Arguments) -> Arguments:
    """Adds from the guest's plan what records of earlier versions lack: PF and number, or address, of the VF."""
    for vf in context.guest.plan.vfs if context.guest else ():
        own: Arguments = {"pf": str(vf.pf), "index": vf.index, "address": str(vf.address)}
        if all(arguments.get(name, value) == value for name, value in own.items()):
            return {**own, **arguments}
    return arguments


def _wait_for_carrier(host: HostRoot, pf: PciAddress, interface: str) -> None:
    """Creating VFs resets the NIC. Until its link is up again, the mailbox of the VFs does not respond ("PF still in reset")."""
    if not wait_until(lambda: read_up(host, pf, interface), timeout=CARRIER_SECONDS, interval=0.1):
        message = f"{interface} has no carrier {CARRIER_SECONDS:g} s after its VFs were created"
        raise HostError(message, "check the cable and the switch port")


VfStates = Mapping[PciAddress, Sequence[VfState] | str]
"""PF → the settings of its VFs, or the reason why they cannot be read."""


def find_drivers(host: HostRoot, plan: Plan) -> dict[PciAddress, str | None]:
    """None for a VF that has no driver, or is gone."""
    return {vf.address: read_driver(host, vf.address) for vf in plan.vfs}


def diff_devices(plan: Plan, running: Pinning, drivers: Mapping[PciAddress, str | None], states: VfStates) -> tuple[str, ...]:
    """Differences between a running guest's devices and its plan. Pure."""
    findings = [
        f"VF {vf.address}: driver {drivers.get(vf.address) or 'none'}, expected {VFIO}"
        for vf in plan.vfs
        if drivers.get(vf.address) != VFIO
    ]
    expected = [vf.address for vf in plan.vfs] + [disk.address for disk in plan.disks if disk.address]
    if sorted(running.hostdevs) != sorted(expected):
        findings.append(f"devices passed through: {_join(running.hostdevs)}, expected {_join(expected)}")
    return (*findings, *diff_interfaces(plan, running.interfaces), *diff_vf(plan, states))


def diff_vf(plan: Plan, states: VfStates) -> tuple[str, ...]:
    """Differences between the VF settings that PFs enforce and the guest's. Pure."""
    findings: list[str] = []
    for vf in plan.vfs:
        now = states.get(vf.pf, ())
        if isinstance(now, str):
            findings.append(f"VF {vf.address}: settings cannot be read from PF {vf.pf}: {now}")
            continue
        state = next((state for state in now if state.index == vf.index), None)
        if state is None:
            findings.append(f"{vf.interface} has no VF {vf.index}")
        else:
            differences = state.diff(state.with_defaults(vf.mac, vf.vlan, vf.rate)).values()
            findings += [f"VF {vf.address}: {difference}" for difference in differences]
    return tuple(findings)


def find_still_bound(host: HostRoot, plan: Plan) -> tuple[str, ...]:
    """VFs of an ended guest that are still passed through. Restoring them has verified their addresses."""
    return tuple(f"VF {vf} is still bound to {VFIO}" for vf, driver in find_drivers(host, plan).items() if driver == VFIO)


def build_nics(plan: Plan) -> list[Element]:
    parts = []
    for slot, nic in enumerate(plan.nics, _FIRST_SLOT):
        # On the root bus, as an integrated endpoint: no emulated root port is needed, and libvirt adds no spare one.
        guest_address = element("address", type="pci", domain="0x0000", bus="0x00", slot=f"0x{slot:02x}", function="0x0")
        parts.append(_build_hostdev(nic.address, guest_address) if nic.address else build_interface(nic, guest_address))
    return parts


def _build_hostdev(address: PciAddress, guest_address: Element) -> Element:
    """managed='no': binding to vfio-pci and back is a step with its own undo."""
    source = element(
        "address",
        domain=f"0x{address.domain:04x}",
        bus=f"0x{address.bus:02x}",
        slot=f"0x{address.device:02x}",
        function=f"0x{address.function:x}",
    )
    return element("hostdev", element("source", source), guest_address, mode="subsystem", type="pci", managed="no")


def _join(addresses: Iterable[PciAddress]) -> str:
    return ", ".join(map(str, addresses)) or "none"
