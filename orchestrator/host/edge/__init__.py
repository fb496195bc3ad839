"""Edge modes: how an uplink is made to send every frame between guests to the external switch. One module per way."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.host.edge import hwmode, macvtap, nft, registers
from orchestrator.host.edge.base import HardwareEdge, SoftwareEdge, Tap, find_link
from orchestrator.host.root import HostRoot
from orchestrator.model.edge import EdgeMode
from orchestrator.model.topology import Link, PhysicalFunction

__all__ = [
    "SOFTWARE",
    "SoftwareEdge",
    "Tap",
    "describe_edge",
    "find_link",
    "find_software_edge",
    "may_have_vepa",
    "read_edge_mode",
    "set_edge_mode",
]

_HARDWARE: tuple[HardwareEdge, ...] = (registers, hwmode)
"""The first that serves a PF is used."""
SOFTWARE: Mapping[EdgeMode, SoftwareEdge] = {EdgeMode.MACVTAP_VEPA: macvtap, EdgeMode.NFT_VEPA: nft}
"""In the order in which the planner tries them."""


def read_edge_mode(host: HostRoot, pf: PhysicalFunction) -> EdgeMode | None:
    """None if neither chip nor driver reports it. HostError has EINVAL without iomem=relaxed, ENODEV without a response."""
    return _find(pf).read_mode(host, pf)


def set_edge_mode(host: HostRoot, pf: PhysicalFunction, mode: EdgeMode) -> None:
    """No-op if the PF has the mode. Raises HostError if neither driver nor chip can set it (EOPNOTSUPP), the register cannot be
    mapped (EINVAL) or does not respond (ENODEV), or another value is read back.
    """
    _find(pf).set_mode(host, pf, mode)


def describe_edge(host: HostRoot, pf: PhysicalFunction) -> str:
    """One line of evidence."""
    return _find(pf).describe(host, pf)


def find_software_edge(link: Link) -> tuple[EdgeMode, SoftwareEdge] | None:
    """The mode whose taps are of the interface's kind; None if it is not a tap of a software edge."""
    return next(((mode, edge) for mode, edge in SOFTWARE.items() if edge.KIND == link.kind), None)


def may_have_vepa(pf: PhysicalFunction) -> bool:
    """By its chip and driver: most drivers report the mode only while VFs exist."""
    return _find(pf).may_have_vepa(pf)


def _find(pf: PhysicalFunction) -> HardwareEdge:
    return next(edge for edge in _HARDWARE if edge.serves(pf))
