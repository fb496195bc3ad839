"""Edge modes: where frames between two guests of one uplink are switched."""

from __future__ import annotations

from enum import StrEnum


class EdgeMode(StrEnum):
    """The first two names are those of bridge(8) `hwmode`."""

    VEB = "veb"  # in the NIC; no guest is started with it
    VEPA = "vepa"  # externally, by a switch port with reflective relay (hairpin); the NIC sends every frame out
    CHANNEL = "channel"  # externally: each VF has a VLAN of its own, so the NIC cannot switch between VFs
    MACVTAP_VEPA = "macvtap-vepa"  # externally; the host's kernel sends every frame out, by macvtap devices
    NFT_VEPA = "nft-vepa"  # externally; the host's kernel sends every frame out, by nftables rules

    @property
    def is_software(self) -> bool:
        """The host's kernel forwards the frames: the guest has no VF."""
        return self in (EdgeMode.MACVTAP_VEPA, EdgeMode.NFT_VEPA)


EDGE_SETTINGS: tuple[str, ...] = ("auto", *(mode for mode in EdgeMode if mode is not EdgeMode.VEB))
"""What an uplink can be set to: a mode for guests, or "auto", with which the manager chooses one."""
