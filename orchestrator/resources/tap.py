"""The host's end of a NIC of a software edge: the tap with its rules, its drift, and the NIC's part of the domain XML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar
from xml.etree.ElementTree import Element

from orchestrator.errors import HostError
from orchestrator.host.edge import SOFTWARE, Tap
from orchestrator.host.root import HostRoot
from orchestrator.model.edge import EdgeMode
from orchestrator.model.plan import NicPlan, Plan
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments
from orchestrator.resources.xml import element
from orchestrator.values import MacAddress


@dataclass(frozen=True)
class TapBefore:
    """A tap that does not exist yet."""

    edge: EdgeMode
    name: str
    mac: MacAddress
    uplink: str


@register
@dataclass(frozen=True)
class CreateTap:
    """The guest's QEMU opens a tap that exists, and whose rules are in force: no frame passes before them."""

    action: ClassVar[str] = "tap"
    nic: NicPlan

    def describe(self) -> str:
        return f"create {self.nic.tap} on {self.nic.interface} in edge mode {self.nic.edge}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        tap = make_tap(self.nic)
        if any(link.name == tap.name for link in host.net.read_links()):
            hint = f"if no program uses it: ip link delete {tap.name}"
            raise HostError(f"cannot create {tap.name}: an interface of this name exists", hint)
        return to_arguments(TapBefore(self.nic.edge, tap.name, tap.mac, tap.uplink))

    def apply(self, host: HostRoot) -> None:
        SOFTWARE[self.nic.edge].create(host, make_tap(self.nic))

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op for what does not exist, as after a reboot. Raises HostError for an interface that is not this tap."""
        before = parse_arguments(TapBefore, arguments)
        SOFTWARE[before.edge].remove(context.host, Tap(before.name, before.mac, before.uplink))


def make_tap(nic: NicPlan) -> Tap:
    return Tap(nic.tap, nic.mac, nic.interface)


def diff_taps(host: HostRoot, plan: Plan) -> tuple[str, ...]:
    """One sentence per difference between the taps and their rules, and what the plan needs."""
    return tuple(finding for nic in plan.software_nics for finding in SOFTWARE[nic.edge].diff(host, make_tap(nic)))


def require_taps(host: HostRoot, plan: Plan) -> None:
    """Raises HostError if a tap or its rules still differ from the plan after they were restored: the guest must not run then."""
    if findings := restore_taps(host, plan).remaining:
        hint = "check for a program that manages network interfaces or nftables"
        raise HostError(f"guest {plan.name}: {'; '.join(findings)}", hint)


@dataclass(frozen=True)
class RestoredTaps:
    """What restoring found different immediately before, and what differs afterwards, which can be a later change."""

    found: tuple[str, ...]
    remaining: tuple[str, ...]


def restore_taps(host: HostRoot, plan: Plan) -> RestoredTaps:
    """Sets modes and rules that were changed again."""
    found: tuple[str, ...] = ()
    for nic in plan.software_nics:
        edge, tap = SOFTWARE[nic.edge], make_tap(nic)
        if differences := edge.diff(host, tap):
            edge.restore(host, tap)
            found += differences
    return RestoredTaps(found, diff_taps(host, plan))


def find_left_over(host: HostRoot, plan: Plan) -> tuple[str, ...]:
    """Taps of an ended guest that still exist."""
    names = {link.name for link in host.net.read_links()} if plan.software_nics else set()
    return tuple(f"interface {nic.tap} still exists" for nic in plan.software_nics if nic.tap in names)


def diff_interfaces(plan: Plan, running: Iterable[str]) -> tuple[str, ...]:
    """Differences between the taps that a running guest has and its plan. Pure."""
    found, expected = sorted(running), sorted(nic.tap for nic in plan.software_nics)
    return () if found == expected else (f"network interfaces: {_join(found)}, expected {_join(expected)}",)


def build_interface(nic: NicPlan, guest_address: Element) -> Element:
    """managed='no': creating and removing the tap is a step with its own undo, and libvirt changes nothing of it."""
    return element(
        "interface",
        element("mac", address=str(nic.mac)),
        element("target", dev=nic.tap, managed="no"),
        element("model", type="virtio"),
        # The kernel moves the frames. Its thread belongs to QEMU (since Linux 6.4) and keeps to the emulator's CPUs.
        element("driver", name="vhost"),
        element("rom", enabled="no"),
        guest_address,
        type="ethernet",
    )


def _join(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
