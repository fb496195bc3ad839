"""The request that sets the edge mode of an uplink."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class UplinkRequest(BaseModel):
    """Sets the edge mode of an uplink. ``edge``: a mode, "auto", or "configured" for that of the configuration."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    edge: Literal["auto", "configured", "vepa", "channel", "macvtap-vepa", "nft-vepa"]
