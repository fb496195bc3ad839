"""What drivers of physical functions let the host enforce for a VF: struct net_device_ops of each driver, Linux 6.12.

Before VFs exist, the kernel does not tell.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model.topology import PhysicalFunction


@dataclass(frozen=True)
class VfControls:
    spoof_check: bool  # ndo_set_vf_spoofchk: a VF can send from its own address only
    max_rate: bool  # ndo_set_vf_rate
    trust: bool  # ndo_set_vf_trust: a VF can be kept from changing its address


_ALL = VfControls(spoof_check=True, max_rate=True, trust=True)
_DRIVERS = {
    "be2net": VfControls(spoof_check=True, max_rate=True, trust=False),
    "bnxt_en": _ALL,
    "i40e": _ALL,
    "ice": _ALL,
    "igb": _ALL,
    "ixgbe": _ALL,
    "mlx5_core": _ALL,
    "nfp": _ALL,
}
# igb_ndo_set_vf_bw(): EOPNOTSUPP for all other chips of this driver.
_82576 = ("10c9", "10e6", "10e7", "10e8", "150a", "150d", "1518", "1526")


def find_controls(pf: PhysicalFunction) -> VfControls | None:
    """By its driver and chip; None if the driver is not known here."""
    found = _DRIVERS.get(pf.driver or "")
    if found and pf.driver == "igb" and pf.device.removeprefix("8086:") not in _82576:
        return VfControls(spoof_check=found.spoof_check, max_rate=False, trust=found.trust)
    return found
