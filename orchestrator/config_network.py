"""The sections of the configuration about uplinks and external switches."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config_values import PathField, StrictModel, check_edge, check_interface, check_vlans
from orchestrator.model.edge import EdgeMode
from orchestrator.model.fields import NameField
from orchestrator.model.network import MAX_VLANS_TEXT, describe_vlans, parse_vlans


class UplinkConfig(StrictModel):
    """One of the uplinks of [host]."""

    # Edge mode; "auto": the manager chooses a mode that the uplink can have; if it can have none, requests for it are refused.
    edge: Annotated[str, AfterValidator(check_edge)] = "auto"
    # VLANs of tenant networks that the switch carries on this port, such as "100-199,300". Hosts on one switch need different
    # ranges. Without it operators choose the VLAN of each network.
    vlans: Annotated[str, Field(max_length=MAX_VLANS_TEXT), AfterValidator(check_vlans)] | None = None

    # VLANs for the edge mode "channel", such as "1000-1199": each VF of a guest gets one of its own, and the switch translates
    # between them. Without it this mode is not possible.
    channels: Annotated[str, Field(max_length=MAX_VLANS_TEXT), AfterValidator(check_vlans)] | None = None

    # The external switch that the uplink's cable leads to, as registered by `nohype switch add`.
    switch: NameField | None = None
    # The port of this switch.
    port: Annotated[str, AfterValidator(check_interface)] | None = None

    @model_validator(mode="after")
    def _check_port(self) -> Self:
        if bool(self.switch) != bool(self.port):
            raise ValueError("switch and port belong together; give both or neither")
        return self

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        if self.edge == EdgeMode.CHANNEL and not self.channels:
            raise ValueError("edge mode channel needs channels, the VLANs that guests get, such as 1000-1199")
        if both := (self.vlan_set or frozenset()) & (self.channel_set or frozenset()):
            raise ValueError(f"vlans and channels have VLANs {describe_vlans(both)} in common; give each VLAN one purpose")
        return self

    @property
    def mode(self) -> EdgeMode | None:
        """None for "auto"."""
        return None if self.edge == "auto" else EdgeMode(self.edge)

    @property
    def vlan_set(self) -> frozenset[int] | None:
        return None if self.vlans is None else parse_vlans(self.vlans)

    @property
    def channel_set(self) -> frozenset[int] | None:
        return None if self.channels is None else parse_vlans(self.channels)


class SwitchConfig(StrictModel):
    """Access to external switches."""

    ssh_key: PathField | None = None  # private key (Ed25519, without passphrase) that logs in on switches; readable only by root
