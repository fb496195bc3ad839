"""Puts the PF's embedded switch into VEPA mode (IEEE 802.1Qbg): each frame leaves through the port, even to a sibling VF. Or
lets an uplink receive the frames to the guests of a software edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.errors import HostError
from orchestrator.host.edge import find_link, read_edge_mode, set_edge_mode
from orchestrator.host.edge.returns import count_returns, is_counting, stop_counting
from orchestrator.host.pci import has_function
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_numvfs, read_pf
from orchestrator.model.edge import EdgeMode
from orchestrator.model.topology import PhysicalFunction
from orchestrator.resources.step import Arguments, UndoContext, parse_arguments, register, to_arguments
from orchestrator.values import MacAddress, PciAddress


@dataclass(frozen=True)
class EdgeModeBefore:
    """The edge mode of a PF; empty if it could not be read."""

    pf: PciAddress
    mode: str
    interface: str = ""


@register
@dataclass(frozen=True)
class SetEdgeMode:
    """Must come after the VFs are created: their creation resets the embedded switch."""

    action: ClassVar[str] = "edge-mode"
    pf: PhysicalFunction
    mode: EdgeMode

    def describe(self) -> str:
        return f"put {self.pf.interface} ({self.pf.address}) into {self.mode} mode"

    def read_before(self, host: HostRoot) -> Arguments | None:
        before = read_edge_mode(host, self.pf)
        if before == self.mode:
            return None
        return to_arguments(EdgeModeBefore(self.pf.address, str(before or ""), self.pf.interface or ""))

    def apply(self, host: HostRoot) -> None:
        set_edge_mode(host, self.pf, self.mode)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op for a PF that is gone, has no VFs (as after a reboot), or whose mode could not be read before."""
        host, before = context.host, parse_arguments(EdgeModeBefore, arguments)
        if before.mode and has_function(host, before.pf) and read_numvfs(host, before.pf):
            set_edge_mode(host, read_pf(host, before.pf, [before.interface]), EdgeMode(before.mode))


@dataclass(frozen=True)
class PromiscuousBefore:
    """An uplink whose promiscuous mode was off."""

    uplink: str


@register
@dataclass(frozen=True)
class SetPromiscuous:
    """For edge modes that do not add the guests' addresses to the uplink's filter."""

    action: ClassVar[str] = "promiscuous"
    uplink: str

    def describe(self) -> str:
        return f"set {self.uplink} promiscuous"

    def read_before(self, host: HostRoot) -> Arguments | None:
        link = find_link(host, self.uplink)
        return None if link and link.promiscuous else to_arguments(PromiscuousBefore(self.uplink))

    def apply(self, host: HostRoot) -> None:
        host.net.set_promiscuous(self.uplink, on=True)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        """No-op if the uplink is gone, or not promiscuous as after a reboot."""
        before = parse_arguments(PromiscuousBefore, arguments)
        if (link := find_link(context.host, before.uplink)) and link.promiscuous:
            context.host.net.set_promiscuous(before.uplink, on=False)


@dataclass(frozen=True)
class ReturnsBefore:
    """An uplink whose frames between guests are not counted, or are counted for other guests."""

    uplink: str


@register
@dataclass(frozen=True)
class CountReturns:
    """The frames between guests that must return from the external switch. Repeated with the addresses whenever these change;
    without addresses nothing is counted.
    """

    action: ClassVar[str] = "count-returns"
    uplink: str
    macs: tuple[MacAddress, ...]

    def describe(self) -> str:
        return f"count the frames between guests that return to {self.uplink}"

    def read_before(self, host: HostRoot) -> Arguments | None:
        return None if is_counting(host, self.uplink, self.macs) else to_arguments(ReturnsBefore(self.uplink))

    def apply(self, host: HostRoot) -> None:
        """Raises HostError also if the kernel has other rules than were set."""
        count_returns(host, self.uplink, self.macs)
        if not is_counting(host, self.uplink, self.macs):
            hint = "check for a program that manages nftables, such as firewalld"
            raise HostError(f"the rules that count frames between guests on {self.uplink} are not as they were set", hint)

    @staticmethod
    def undo(context: UndoContext, arguments: Arguments) -> None:
        stop_counting(context.host, parse_arguments(ReturnsBefore, arguments).uplink)
