"""What a guest is configured with, from its request and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from orchestrator.model.plan import Plan
from orchestrator.model.request import GuestRequest
from orchestrator.values import MacAddress

CREDENTIALS, CLOUD_INIT = "credentials", "cloud-init"
"""Ways to configure a guest: credentials of systemd, which are not secret; data for cloud-init."""


@dataclass(frozen=True)
class NicAddress:
    """The Ethernet address of a NIC, and its IP address with prefix length, or None."""

    mac: MacAddress
    address: str | None


@dataclass(frozen=True)
class Configuration:
    """``user_data`` and ``network_config`` are secret; None if the request has none."""

    uuid: UUID
    hostname: str
    ssh_keys: tuple[str, ...]
    nics: tuple[NicAddress, ...]
    user_data: str | None = field(default=None, repr=False)
    network_config: str | None = field(default=None, repr=False)


def build_configuration(plan: Plan, request: GuestRequest, texts: Mapping[str, str]) -> Configuration:
    """``texts``: the secret texts by field of the request."""
    nics = tuple(NicAddress(nic.mac, wanted.address) for nic, wanted in zip(plan.nics, request.wanted_nics, strict=False))
    return Configuration(plan.uuid, choose_hostname(request), request.ssh_keys, nics, **texts)


def choose_hostname(request: GuestRequest) -> str:
    return request.hostname or request.name


def list_fields(request: GuestRequest) -> tuple[str, ...]:
    """The fields of a request with which an image must be configurable."""
    return tuple(name for name in ("ssh_keys", "hostname", "user_data", "network_config") if getattr(request, name))
