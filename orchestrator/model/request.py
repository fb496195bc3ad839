"""A guest's request, checked strictly: extra fields and silent conversions are refused.

Values are normalised (sizes, CPUs, addresses), so equal requests compare equal. Stored requests are read here as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import RequestError
from orchestrator.model.boot import BootFiles, is_boot_image
from orchestrator.model.cache import parse_bandwidth
from orchestrator.model.exit_policy import ExitBudgets
from orchestrator.model.fields import (
    check_address,
    check_cmdline,
    check_cpus,
    check_hostname,
    check_interface,
    check_name,
    check_pci_address,
    check_request_id,
    check_size,
    describe,
)
from orchestrator.model.placement import Placement
from orchestrator.model.secret import FROM_LEDGER, DiskSecret, NetworkConfig, Secret, UserData
from orchestrator.model.ssh_key import MAX_KEY, MAX_KEYS, check_ssh_key, check_ssh_keys
from orchestrator.model.target import MAX_NAME, MAX_TARGET, Target, check_login, find_nic, parse_target
from orchestrator.model.waiver import Waiver
from orchestrator.values import CpuSet, PciAddress, Size

_MAX_CMDLINE = 1024
_MAX_TEXT = 128
"""Characters of a parsed field; error messages repeat it."""
_MAX_INTERFACE = 15
"""IFNAMSIZ, less the final zero byte."""
MAX_NICS = 8
MAX_DISKS = 4
MAX_RATE = 1_000_000
"""Mbit/s. The kernel's settings of a VF have 32 bits (struct ifla_vf_rate)."""
DISK_SECRET = "disks.0.secret"
"""Name of the secret of a network disk, which is the first disk."""
_SERIAL = re.compile(r"[!-~](?:[ -~]{0,18}[!-~])?")
"""NVMe base specification 2.0, figure 275 (Identify Controller): 20 bytes of ASCII, padded with spaces."""


def _target(text: str) -> str:
    return str(parse_target(text))


def _bandwidth(text: str) -> str:
    return str(parse_bandwidth(text))


def check_serial(text: str) -> str:
    if not _SERIAL.fullmatch(text):
        raise ValueError(f"{text!r} is not the serial number of a disk: 1 to 20 visible characters; `nohype survey` shows them")
    return text


class Restart(StrEnum):
    NEVER = "never"
    ON_FAILURE = "on-failure"


class Profile(StrEnum):
    TICKLESS = "tickless"
    """The guest's kernel keeps its timer tick, its own work and interrupts away from the vCPUs of the application."""


class NicRequest(BaseModel):
    """One network interface of a guest.

    Attributes:
        uplink: the PF's network interface; None for the planner's choice.
        vf: PCI address; None for any.
        address: IP address and prefix length inside the guest, or None.
        network: name of a tenant network; None for none.
        rate: limit for sending, in Mbit/s; None for none.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    uplink: Annotated[str, Field(max_length=_MAX_INTERFACE), AfterValidator(check_interface)] | None = None
    vf: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_pci_address)] | None = None
    address: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_address)] | None = None
    network: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_name)] | None = None
    rate: Annotated[int, Field(ge=1, le=MAX_RATE)] | None = None

    @property
    def vf_address(self) -> PciAddress | None:
        return PciAddress.parse(self.vf) if self.vf else None


class DiskKind(StrEnum):
    NVME = "nvme"
    """A whole NVMe controller of the host, passed through."""
    EMULATED = "emulated"
    """A file or logical volume of the host that QEMU shows as a virtio disk."""
    NETWORK = "network"
    """A target that the guest connects to over its NIC, and mounts its root from."""


class DiskRequest(BaseModel):
    """One disk of a guest.

    Attributes:
        size: the minimum; None for any, which an emulated disk does not allow.
        serial: of the NVMe controller; None for the planner's choice.
        target: URL of a network disk; a request may omit ``kind`` then.
        initiator: name with which the guest logs in to the target; if None, it is derived from the guest's id.
        user: name for CHAP (iSCSI).
        secret: for DH-HMAC-CHAP (NVMe) or CHAP. Stored as ``GuestRequest.user_data`` is.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    size: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_size)] | None = None
    serial: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_serial)] | None = None
    kind: Annotated[DiskKind, Field(strict=False)] = DiskKind.NVME
    target: Annotated[str, Field(max_length=MAX_TARGET), AfterValidator(_target)] | None = None
    initiator: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    user: Annotated[str, Field(max_length=_MAX_TEXT)] | None = None
    secret: DiskSecret | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_kind(cls, fields: object) -> object:
        if isinstance(fields, Mapping) and fields.get("target") is not None and "kind" not in fields:
            return {**fields, "kind": DiskKind.NETWORK}
        return fields

    @model_validator(mode="after")
    def _check_kind(self) -> DiskRequest:
        if self.kind is DiskKind.EMULATED and (self.serial or not self.size):
            raise ValueError("an emulated disk has a size and no serial; give size, omit serial")
        is_network = self.kind is DiskKind.NETWORK
        if is_network != (self.target is not None) or (is_network and (self.size or self.serial)):
            raise ValueError("a network disk has a target, and neither size nor serial; other disks have no target")
        if self.parsed_target:
            check_login(self.parsed_target, self.initiator, self.user, self.secret)
        elif self.initiator or self.user or self.secret:
            raise ValueError("initiator, user and secret are for the target of a network disk")
        return self

    @property
    def parsed_target(self) -> Target | None:
        """None unless it is a network disk."""
        return parse_target(self.target) if self.target is not None else None

    @property
    def minimum(self) -> int:
        """Bytes."""
        return Size.parse(self.size).bytes if self.size else 0


class GuestRequest(BaseModel):
    """A request for a guest.

    Attributes:
        name: 1 to 40 of a-z, 0-9 and inner hyphens.
        cores: whole physical cores; on a host with SMT the guest sees each core's threads as vCPUs.
        memory: a whole number of huge pages ("256M").
        address: IP address and prefix length of the only NIC, or None; not with ``nics``.
        image: name of an image; with ``boot`` that of the image made of these files.
        boot: files that the manager downloads for the guest; None to start an image of the store.
        cmdline: extra arguments for the guest's kernel command line.
        page_size: "2M" or "1G"; None for the host's setting.
        cache_ways: ways of each last-level cache of its cores that no other guest or program fills; None for no limit.
        bandwidth: limit of memory bandwidth for each L3 cache of its cores, "40%" or "4000MB/s"; None for no limit.
        placement: None lets the planner choose. Its ``vf`` is not allowed with ``nics``.
        nics: in the order of the guest's interfaces; None for one NIC.
        disks: in the order of the guest's disks; an image with a root file system is written to the first.
        accept: properties that the guest may lack.
        remove: delete the guest when it ends without failure.
        restart: restart the guest after a failure, never after a power off.
        disengage_after: seconds after which the guest's boot counts as over, if the guest has not called before; None: see
            `guests.disengagement`.
        housekeeping: vCPUs ("0-1") that do the guest's housekeeping; the others are for its application. None: all do both.
        profile: how the guest's kernel uses its vCPUs; None for the image's own way.
        exit_policy: judged in addition to the operator's.
        id: the caller's request id: repeating it with the same fields changes nothing.
        ssh_keys: OpenSSH public keys that may log in.
        hostname: None for the guest's name.
        user_data: for cloud-init. A claim's request has only its hash; `guests.secrets` stores the text.
        network_config: for cloud-init, version 2; None to derive it from ``nics``. Stored as ``user_data`` is.
    """

    # Messages of pydantic must not repeat a secret.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_name)]
    cores: Annotated[int, Field(ge=1, le=1024)] = 1
    memory: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_size)]
    image: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_name)]
    boot: BootFiles | None = None
    address: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_address)] | None = None
    cmdline: Annotated[str, Field(max_length=_MAX_CMDLINE), AfterValidator(check_cmdline)] = ""
    page_size: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_size)] | None = None
    cache_ways: Annotated[int, Field(ge=1, le=64)] | None = None
    bandwidth: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(_bandwidth)] | None = None
    placement: Placement | None = None
    nics: Annotated[tuple[NicRequest, ...], Field(strict=False, min_length=1, max_length=MAX_NICS)] | None = None
    disks: Annotated[tuple[DiskRequest, ...], Field(strict=False, max_length=MAX_DISKS)] = ()
    accept: Annotated[tuple[Annotated[Waiver, Field(strict=False)], ...], Field(strict=False, max_length=len(Waiver))] = ()
    remove: bool = False
    restart: Annotated[Restart, Field(strict=False)] = Restart.NEVER
    disengage_after: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    housekeeping: Annotated[str, Field(max_length=4096), AfterValidator(check_cpus)] | None = None
    profile: Annotated[Profile, Field(strict=False)] | None = None
    exit_policy: ExitBudgets | None = None
    id: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_request_id)] | None = None
    ssh_keys: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_KEY), AfterValidator(check_ssh_key)], ...],
        Field(strict=False, max_length=MAX_KEYS),
    ] = ()
    hostname: Annotated[str, Field(max_length=_MAX_TEXT), AfterValidator(check_hostname)] | None = None
    user_data: UserData | None = None
    network_config: NetworkConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_boot_image(cls, fields: object) -> object:
        if isinstance(fields, Mapping) and "image" not in fields and isinstance(fields.get("boot"), Mapping):
            with suppress(ValidationError):  # reported as an error of ``boot``
                return {**fields, "image": BootFiles.model_validate(fields["boot"]).image_name}
            return {**fields, "image": "boot"}
        return fields

    @model_validator(mode="after")
    def _check_boot(self) -> GuestRequest:
        if self.boot and self.image != self.boot.image_name:
            raise ValueError("image cannot be given together with boot")
        if not self.boot and is_boot_image(self.image):
            raise ValueError(f"image {self.image} consists of files of a boot server; request them with boot")
        return self

    @model_validator(mode="after")
    def _check_nics(self) -> GuestRequest:
        if self.nics is not None:
            if self.address is not None or (self.placement and self.placement.vf):
                raise ValueError("nics cannot be given together with address or placement.vf; move them into nics")
            named = [nic.vf for nic in self.nics if nic.vf]
            if len(named) != len(set(named)):
                raise ValueError("nics name the same VF twice; name each VF once")
        return self

    @model_validator(mode="after")
    def _check_disks(self) -> GuestRequest:
        named = [disk.serial for disk in self.disks if disk.serial]
        if len(named) != len(set(named)):
            raise ValueError("disks name the same serial twice; name each disk once")
        if any(disk.target for disk in self.disks[1:]):
            raise ValueError("a network disk holds the guest's root: only the first disk can be one; connect others in the guest")
        if target := self.network_disk:
            find_nic(target, [nic.address for nic in self.wanted_nics])
        return self

    @model_validator(mode="after")
    def _check_profile(self) -> GuestRequest:
        # The kernel starts on vCPU 0, and that keeps the time until the others are up.
        if self.profile and 0 not in (self.housekeeping_vcpus or ()):
            raise ValueError(f"profile {self.profile} needs housekeeping, with vCPU 0 among it: the vCPUs that keep their tick")
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> GuestRequest:
        check_ssh_keys(self.ssh_keys)
        return self

    @property
    def secrets(self) -> dict[str, Secret]:
        """The secrets that the request has, by field."""
        texts = {"user_data": self.user_data, "network_config": self.network_config, DISK_SECRET: None}
        if self.disks:
            texts[DISK_SECRET] = self.disks[0].secret
        return {name: secret for name, secret in texts.items() if secret is not None}

    def without_secret_texts(self) -> GuestRequest:
        """For a claim, and for all that is shown or kept in memory."""
        hidden = {name: secret.without_text() for name, secret in self.secrets.items()}
        disk_secret = hidden.pop(DISK_SECRET, None)
        copy = self.model_copy(update=hidden)
        if disk_secret is None:
            return copy
        first = self.disks[0].model_copy(update={"secret": disk_secret})
        return copy.model_copy(update={"disks": (first, *self.disks[1:])})

    @property
    def network_disk(self) -> Target | None:
        """The target from which the guest mounts its root."""
        return self.disks[0].parsed_target if self.disks else None

    @property
    def limits_cache(self) -> bool:
        return self.cache_ways is not None or self.bandwidth is not None

    @property
    def wanted_nics(self) -> tuple[NicRequest, ...]:
        """At least one, also if the request has no ``nics``."""
        return self.nics or (NicRequest(vf=self.placement.vf if self.placement else None, address=self.address),)

    @property
    def housekeeping_vcpus(self) -> frozenset[int] | None:
        return frozenset(CpuSet.parse(self.housekeeping).ids) if self.housekeeping is not None else None

    @property
    def size(self) -> Size:
        return Size.parse(self.memory)


def parse_guest_request(fields: dict[str, object]) -> GuestRequest:
    """Reads untrusted JSON or the command line. Raises RequestError with each invalid field on one line."""
    try:
        return GuestRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestError("invalid request: " + describe(error)) from None


def parse_stored_request(text: str) -> GuestRequest:
    """Reads what ``model_dump_json`` wrote. Raises ValueError."""
    return GuestRequest.model_validate_json(text, context=FROM_LEDGER)
