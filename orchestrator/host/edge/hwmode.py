"""VEPA by the driver: `bridge link set dev X hwmode vepa` (bridge(8)), for all PFs that no other module serves."""

from __future__ import annotations

from errno import EOPNOTSUPP

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.model.edge import EdgeMode
from orchestrator.model.topology import PhysicalFunction

_UNSUPPORTED = "neither driver nor chip supports VEPA; use a NIC that does, or a software edge without VFs"


# Drivers with an ndo_bridge_setlink that takes VEPA (Linux 6.12).
_DRIVERS = ("be2net", "bnxt_en", "i40e", "ice", "ixgbe", "mlx5_core", "nfp")


def may_have_vepa(pf: PhysicalFunction) -> bool:
    return pf.driver in _DRIVERS


def serves(_pf: PhysicalFunction) -> bool:
    return True


def read_mode(host: HostRoot, pf: PhysicalFunction) -> EdgeMode | None:
    mode = host.net.read_hwmode(pf.interface) if pf.interface else None
    return EdgeMode(mode) if mode else None


def set_mode(host: HostRoot, pf: PhysicalFunction, mode: EdgeMode) -> None:
    if pf.interface is None:
        raise HostError(f"cannot set edge mode {mode} on PF {pf.address}: no network interface", _UNSUPPORTED, EOPNOTSUPP)
    try:
        host.net.set_hwmode(pf.interface, mode)
    except HostError as error:
        hint = _UNSUPPORTED if error.errno == EOPNOTSUPP else error.hint
        raise HostError(f"cannot set edge mode {mode} on PF {pf.address} ({pf.interface})", hint, error.errno) from error


def describe(host: HostRoot, pf: PhysicalFunction) -> str:
    mode = read_mode(host, pf)
    return f"PF {pf.address} ({pf.interface or 'no interface'}, {pf.driver or 'no driver'}) hwmode {mode or 'unknown'}"
