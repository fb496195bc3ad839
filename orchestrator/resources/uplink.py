"""Puts the PF's embedded switch into VEPA mode (IEEE 802.1Qbg): each frame leaves through the port, even one for a sibling VF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.host.edge import EdgeMode, read_edge_mode, set_edge_mode
from orchestrator.host.pci import has_function
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_numvfs, read_pf
from orchestrator.model.topology import PhysicalFunction
from orchestrator.resources.step import Arguments
from orchestrator.values import PciAddress


@dataclass(frozen=True)
class SetEdgeMode:
    """Sets the edge mode of a PF. Must come after the VFs were made: making them resets the embedded switch."""

    action: ClassVar[str] = "edge-mode"
    pf: PhysicalFunction
    mode: EdgeMode

    def describe(self) -> str:
        """See Step."""
        return f"put {self.pf.interface} ({self.pf.address}) into {self.mode} mode"

    def read_before(self, host: HostRoot) -> Arguments | None:
        """See Step."""
        before = read_edge_mode(host, self.pf)
        if before == self.mode:
            return None
        return {"pf": str(self.pf.address), "interface": self.pf.interface or "", "mode": str(before or "")}

    def apply(self, host: HostRoot) -> None:
        """See Step."""
        set_edge_mode(host, self.pf, self.mode)


def undo_edge_mode(host: HostRoot, arguments: Arguments) -> None:
    """Puts the edge mode back; a PF that is gone, could not tell its mode, or has no VFs, as after a reboot, needs none."""
    address = PciAddress.parse(str(arguments["pf"]))
    if not arguments["mode"] or not has_function(host, address) or not read_numvfs(host, address):
        return
    pf = read_pf(host, address, [str(arguments.get("interface", ""))])
    set_edge_mode(host, pf, EdgeMode(str(arguments["mode"])))
