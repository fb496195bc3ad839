"""What a guest is configured with, from its request and its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from orchestrator.model.plan import Plan
from orchestrator.model.request import DISK_SECRET, GuestRequest
from orchestrator.model.target import default_initiator
from orchestrator.values import MacAddress

CREDENTIALS, CLOUD_INIT = "credentials", "cloud-init"
"""Ways to configure a guest: credentials of systemd, which are not secret; data for cloud-init."""
USER_DATA, NETWORK_CONFIG = "user_data", "network_config"
"""Fields of a request with texts for cloud-init."""


@dataclass(frozen=True)
class NicAddress:
    """The Ethernet address of a NIC, and its IP address with prefix length, or None."""

    mac: MacAddress
    address: str | None


@dataclass(frozen=True)
class DiskLogin:
    """How a guest logs in to the target of its root. Without authentication user and secret are empty."""

    initiator: str
    user: str = ""
    secret: str = field(default="", repr=False)


@dataclass(frozen=True)
class Configuration:
    """``user_data`` and ``network_config`` are secret; None if the request has none.

    ``disk_login`` is None without a network disk.
    """

    uuid: UUID
    hostname: str
    ssh_keys: tuple[str, ...]
    nics: tuple[NicAddress, ...]
    user_data: str | None = field(default=None, repr=False)
    network_config: str | None = field(default=None, repr=False)
    disk_login: DiskLogin | None = None


def build_configuration(plan: Plan, request: GuestRequest, texts: Mapping[str, str]) -> Configuration:
    """``texts``: the secret texts by field of the request."""
    nics = tuple(NicAddress(nic.mac, wanted.address) for nic, wanted in zip(plan.nics, request.wanted_nics, strict=False))
    given = {name: text for name, text in texts.items() if name != DISK_SECRET}
    login = _build_login(plan, request, texts.get(DISK_SECRET, ""))
    return Configuration(plan.uuid, choose_hostname(request), request.ssh_keys, nics, **given, disk_login=login)


def choose_initiator(plan: Plan, request: GuestRequest) -> str | None:
    """The name with which the guest logs in to its network disk; None without one, or if a plan has no id yet."""
    if not (target := request.network_disk):
        return None
    known = plan.uuid if plan.uuid.int else None
    return request.disks[0].initiator or (default_initiator(target.transport, known) if known else None)


def _build_login(plan: Plan, request: GuestRequest, secret: str) -> DiskLogin | None:
    initiator = choose_initiator(plan, request)
    return None if initiator is None else DiskLogin(initiator, request.disks[0].user or "", secret)


def choose_hostname(request: GuestRequest) -> str:
    return request.hostname or request.name


def list_fields(request: GuestRequest) -> tuple[str, ...]:
    """The fields of a request with which an image must be configurable."""
    return tuple(name for name in ("ssh_keys", "hostname", "user_data", "network_config") if getattr(request, name))
