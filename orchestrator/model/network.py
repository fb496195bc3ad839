"""Tenant networks: each is one VLAN (IEEE 802.1Q) between the guests that join it, on this host and beyond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import RequestError
from orchestrator.model.fields import check_name, describe
from orchestrator.values import format_ranges

MIN_VLAN, MAX_VLAN = 1, 4094
"""IEEE 802.1Q table 9-2: 0 is a priority tag without VLAN, 4095 is reserved."""
RESERVED = ("all", "host", "none", "untagged")
"""Names that no network may have: readers would take them for the untagged network, the host, or every network."""
MAX_VLANS_TEXT = 256
_MAX_NAME = 128
"""Characters of a parsed name; error messages repeat it."""


@dataclass(frozen=True)
class Network:
    """A network of a tenant, or of the host itself.

    Attributes:
        owner: the tenant whose guests may join, empty for a network of the host.
    """

    name: str
    vlan: int
    owner: str = ""


@dataclass(frozen=True)
class NetworkView:
    """``guests`` are the names of the guests in the network that the caller may see."""

    network: Network
    guests: tuple[str, ...]


def check_network_name(text: str) -> str:
    """Raises ValueError."""
    if check_name(text) in RESERVED:
        raise ValueError(f"{text!r} is reserved; choose another name than {', '.join(RESERVED)}")
    return text


def check_owner(text: str) -> str:
    """Raises ValueError. Empty for the host itself."""
    return check_name(text) if text else text


def parse_vlans(text: str) -> frozenset[int]:
    """Reads "100-199,300". Raises ValueError if it is malformed, empty, or beyond the VLANs that exist."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) <= len(str(MAX_VLAN)) for end in ends):
            raise ValueError(f"{text[:MAX_VLANS_TEXT]!r} is not a list of VLANs; use the form 100-199,300")
        low, high = map(int, ends)
        if not MIN_VLAN <= low <= high <= MAX_VLAN:
            raise ValueError(f"VLANs {low}-{high}: use a rising range within {MIN_VLAN} to {MAX_VLAN}")
        found.update(range(low, high + 1))
    return frozenset(found)


def describe_vlans(vlans: frozenset[int]) -> str:
    """The inverse of `parse_vlans`; "none" without VLANs."""
    return format_ranges(vlans) or "none"


class NetworkRequest(BaseModel):
    """A request for a network.

    Attributes:
        vlan: None for a free one of the uplinks' ranges; only operators may choose it.
        owner: the tenant; None for the caller's own, empty for a network of the host.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(max_length=_MAX_NAME), AfterValidator(check_network_name)]
    vlan: Annotated[int, Field(ge=MIN_VLAN, le=MAX_VLAN)] | None = None
    owner: Annotated[str, Field(max_length=_MAX_NAME), AfterValidator(check_owner)] | None = None


def parse_network_request(fields: dict[str, object]) -> NetworkRequest:
    """Raises RequestError with each invalid field on one line."""
    try:
        return NetworkRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestError("invalid request: " + describe(error)) from None
