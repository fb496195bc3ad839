"""The manager's configuration, /etc/nohype/nohype.toml. The Ansible host role writes it."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from orchestrator.config_network import SwitchConfig, UplinkConfig
from orchestrator.config_values import (
    CERTIFICATE_NAMES,
    PathField,
    StrictModel,
    check_account,
    check_certificate,
    check_file,
    check_housekeeping,
    check_interface,
    check_interfaces,
    check_listen,
    check_page_counts,
    check_page_size,
    check_paths,
    check_server,
    check_socket,
    check_token_hash,
    check_volume_group,
    find_root,
)
from orchestrator.errors import RequestError
from orchestrator.model.access import Quota, Role
from orchestrator.model.exit_policy import ExitBudgets
from orchestrator.model.fields import NameField, SizeField, describe
from orchestrator.model.network import MAX_VLAN
from orchestrator.model.plan import BootPolicy
from orchestrator.model.request import check_serial
from orchestrator.model.waiver import Waiver
from orchestrator.values import DEFAULT_SOCKET, MAX_CPUS, CpuSet, Size

__all__ = ["CERTIFICATE_NAMES", "DEFAULT_CONFIG", "DaemonConfig", "Principals", "read_config"]

DEFAULT_CONFIG = Path("/etc/nohype/nohype.toml")

_LONGEST_FILE = 1 << 20
_LONGEST_MESSAGE = 2000
# NumVFs of the SR-IOV capability has 16 bits (PCIe base specification 9.3.3.7).
_MOST_VFS = 65535
_MOST_PAGES = 1 << 32

_File = Annotated[str, AfterValidator(check_file)]
_Servers = Annotated[tuple[Annotated[str, AfterValidator(check_server)], ...], Field(strict=False)]
_Accounts = Annotated[tuple[Annotated[str, AfterValidator(check_account)], ...], Field(strict=False)]


class HostConfig(StrictModel):
    """What the manager uses of this host."""

    # CPU list for the manager, the kernel's threads and QEMU's helper threads; whole physical cores.
    housekeeping: Annotated[str, AfterValidator(check_housekeeping)]
    # Network interfaces whose virtual functions guests can get.
    uplinks: Annotated[tuple[Annotated[str, AfterValidator(check_interface)], ...], AfterValidator(check_interfaces)] = Field(
        min_length=1, strict=False
    )
    page_size: Annotated[str, AfterValidator(check_page_size)] = "2M"  # huge page size of guests that request none
    vfs_per_uplink: Annotated[int, Field(ge=1, le=_MOST_VFS)] | None = None  # VFs to create; without it: the maximum
    # Huge page size -> pages per node that guests do not get, such as {"1G" = 1}.
    reserved_pages: Annotated[
        dict[Annotated[str, AfterValidator(check_page_size)], Annotated[int, Field(ge=0, le=_MOST_PAGES)]],
        BeforeValidator(check_page_counts),
    ] = {}

    # Properties that guests may lack without accepting it themselves.
    accept: Annotated[tuple[Annotated[Waiver, Field(strict=False)], ...], Field(strict=False)] = ()

    @property
    def housekeeping_cpus(self) -> CpuSet:
        return CpuSet.parse(self.housekeeping)

    @property
    def page(self) -> Size:
        return Size.parse(self.page_size)

    @property
    def reserved(self) -> tuple[tuple[Size, int], ...]:
        return tuple((Size.parse(size), count) for size, count in self.reserved_pages.items())


class DiskConfig(StrictModel):
    """The disks that guests can get. Without this section: NVMe controllers without any known contents."""

    # Serial numbers of NVMe controllers that guests can get although they hold a file system, partitions or the like.
    serials: Annotated[tuple[Annotated[str, AfterValidator(check_serial)], ...], Field(strict=False)] = ()
    # An existing folder for the files of emulated disks. Without it and volume_group the host offers no emulated disks.
    emulated: PathField | None = None
    # An LVM volume group for the volumes of emulated disks, instead of a folder.
    volume_group: Annotated[str, AfterValidator(check_volume_group)] | None = None

    @model_validator(mode="after")
    def _check_emulated(self) -> Self:
        if self.emulated and self.volume_group:
            raise ValueError("emulated and volume_group are both set; remove one of them")
        return self


class PathConfig(StrictModel):
    """Absolute paths. The image store and the console logs are folders."""

    images: PathField = "/var/lib/nohype/images"  # image store
    ledger: PathField = "/var/lib/nohype/ledger.sqlite"  # on a local disk
    consoles: PathField = "/var/log/nohype/guests"  # console logs of guests
    socket: Annotated[str, AfterValidator(check_socket)] = str(DEFAULT_SOCKET)  # as ListenStream= of nohyped.socket

    @model_validator(mode="after")
    def _check_all(self) -> Self:
        check_paths({"ledger": self.ledger, "socket": self.socket}, {"images": self.images, "consoles": self.consoles})
        return self


class EventConfig(StrictModel):
    """The event log."""

    # The newest events that are kept: per tenant and of the host, and as many of the kinds with severity warning.
    keep: Annotated[int, Field(ge=1000, le=10_000_000)] = 20_000


class ExitConfig(StrictModel):
    """Limits of the proof ``exits``, per vCPU and second, for a guest that has booted and is idle or computes."""

    total: Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)] = 2000.0  # all VM exits
    # VM exits that QEMU or KVM's emulator had to serve (port I/O and memory-mapped I/O).
    emulated: Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)] = 10.0
    # Budgets of guests whose boot is over. Without it: a default policy for images that report the end of their boot.
    policy: ExitBudgets | None = None


class AuditConfig(StrictModel):
    """Signed evidence."""

    # PEM file with the Ed25519 key that signs evidence. The systemd credential nohype-audit-key takes precedence.
    key: _File = "/etc/nohype/audit.key"


class Principals(StrictModel):
    """Users, groups and certificates with a role."""

    users: _Accounts = ()  # names or numbers, for the Unix socket
    groups: _Accounts = ()  # names or numbers; a user's supplementary groups count
    # Names in client certificates: CN:alice (or only alice), DNS:host.example, URI:spiffe://..., email:a@b.example.
    certificates: Annotated[tuple[Annotated[str, AfterValidator(check_certificate)], ...], Field(strict=False)] = ()


class AccessConfig(StrictModel):
    """Operators and viewers. Root is always an operator.

    Without this section, and without tenants, every user who can connect to the Unix socket is an operator.
    """

    operators: Principals = Principals()
    viewers: Principals = Principals()


class BootConfig(StrictModel):
    """Kernels and initrds that the manager downloads for guests."""

    servers: _Servers = ()  # URLs of folders that operators may boot guests from
    max_size: SizeField = "256M"  # size of kernel and initrd together
    timeout: Annotated[float, Field(gt=0, le=3600, strict=False)] = 120.0  # seconds for both downloads

    @property
    def policy(self) -> BootPolicy:
        return BootPolicy(self.servers, Size.parse(self.max_size).bytes, self.timeout)


class TenantConfig(Principals):
    """A tenant: its callers, and the quota of all its guests together. What is not set has no limit."""

    cores: Annotated[int, Field(ge=0, le=MAX_CPUS)] | None = None  # whole physical cores
    memory: SizeField | None = None  # such as "64G"; all of it is huge pages
    vfs: Annotated[int, Field(ge=0, le=_MOST_VFS)] | None = None  # virtual functions
    boot_servers: _Servers = ()  # URLs of folders that the tenant may boot guests from
    disks: Annotated[int, Field(ge=0, le=_MOST_VFS)] | None = None  # NVMe controllers and emulated disks
    networks: Annotated[int, Field(ge=0, le=MAX_VLAN)] | None = None  # tenant networks
    exit_policy: ExitBudgets | None = None  # exit policy of its guests; replaces that of the host

    @property
    def quota(self) -> Quota:
        return Quota(self.cores, Size.parse(self.memory) if self.memory else None, self.vfs, self.disks, self.networks)


class TokenConfig(StrictModel):
    """A bearer token, created by `nohype token new`; only its SHA-256 is stored."""

    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$"), AfterValidator(check_token_hash)]  # as printed
    role: Annotated[Role, Field(strict=False)]  # what the token permits
    tenant: str = ""  # a section [tenants.NAME]; required for role "tenant", otherwise not allowed


class ApiConfig(StrictModel):
    """The manager's TLS port; without this section there is only the Unix socket. Files are in PEM format."""

    listen: Annotated[str, AfterValidator(check_listen)]  # address and port: 192.0.2.1:8443, [::]:8443
    certificate: _File  # server certificate, with the intermediate certificates
    key: _File  # private key, readable only by root
    client_ca: _File | None = None  # CA of client certificates; without it only tokens are accepted
    page: bool = False  # serve the web page, whose user enters a token

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class LimitConfig(StrictModel):
    """Limits per client; all callers of a tenant are one client. For operators only ``body`` and ``nesting`` apply."""

    rate: Annotated[float, Field(ge=1e-3, le=1e6, strict=False)] = 50.0  # requests per second
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 100  # requests at the same time after a pause
    # Requests in progress, of each of three kinds: waits (with event streams), kill and delete, all others.
    concurrent: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    body: SizeField = "1M"  # of one request; user data of the maximum size has 770 KB as JSON
    nesting: Annotated[int, Field(ge=1, le=100)] = 16  # levels of JSON in a request

    @property
    def body_bytes(self) -> int:
        return Size.parse(self.body).bytes


class DaemonConfig(StrictModel):
    host: HostConfig
    uplinks: dict[Annotated[str, AfterValidator(check_interface)], UplinkConfig] = {}
    disks: DiskConfig = DiskConfig()
    switches: SwitchConfig = SwitchConfig()
    paths: PathConfig = PathConfig()
    exits: ExitConfig = ExitConfig()
    audit: AuditConfig = AuditConfig()
    events: EventConfig = EventConfig()
    access: AccessConfig | None = None
    tenants: dict[NameField, TenantConfig] = {}
    tokens: dict[NameField, TokenConfig] = {}
    api: ApiConfig | None = None
    limits: LimitConfig = LimitConfig()
    boot: BootConfig = BootConfig()

    @model_validator(mode="after")
    def _check_uplinks(self) -> Self:
        for name in self.uplinks.keys() - set(self.host.uplinks):
            raise ValueError(f"uplinks.{name}: [host] uplinks does not list {name}")
        ports = ((f"{uplink.switch} port {uplink.port}", name) for name, uplink in self.uplinks.items() if uplink.switch)
        for port, first, second in _find_duplicates(ports):
            raise ValueError(f"uplinks.{second}: switch {port} is already that of {first}")
        return self

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        for name, token in self.tokens.items():
            if (token.role is Role.TENANT) != bool(token.tenant):
                raise ValueError(f"tokens.{name}: a tenant is required with role tenant, otherwise not allowed")
            if token.tenant and token.tenant not in self.tenants:
                raise ValueError(f"tokens.{name}: [tenants.{token.tenant}] does not exist")
        for _, first, second in _find_duplicates((token.hash, name) for name, token in self.tokens.items()):
            raise ValueError(f"tokens.{second}: same hash as tokens.{first}; create another token")
        for section, principals in self._sections():
            if section != "access.operators" and (root := find_root(principals.users)):
                raise ValueError(f"{section}.users: {root!r} is root, which is always an operator; remove it")
        for kind in ("users", "groups", "certificates"):
            # One account has one role, or one tenant; two would be ambiguous.
            for name, first, second in _find_duplicates(
                (name, section) for section, principals in self._sections() for name in getattr(principals, kind)
            ):
                raise ValueError(f"{second}.{kind}: {name!r} is already in {first}")
        with_certificate = [section for section, principals in self._sections() if principals.certificates]
        if self.api and not self.api.client_ca and with_certificate:
            raise ValueError(f"api.client_ca is required: {with_certificate[0]} lists client certificates")
        if self.api and not self.tokens and not with_certificate:
            raise ValueError("api: no credentials are configured for this port; add certificates or run `nohype token new`")
        return self

    def _sections(self) -> list[tuple[str, Principals]]:
        access = self.access or AccessConfig()
        roles: list[tuple[str, Principals]] = [("access.operators", access.operators), ("access.viewers", access.viewers)]
        return roles + [(f"tenants.{name}", tenant) for name, tenant in self.tenants.items()]


def _find_duplicates(places: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yields each value that occurs in two sections, with the first and the other section."""
    seen: dict[str, str] = {}
    for value, section in places:
        if seen.setdefault(value, section) != section:
            yield value, seen[value], section


def read_config(path: Path) -> DaemonConfig:
    """Raises RequestError if the file cannot be read, is not TOML or has an invalid field; with the path of the field."""
    try:
        return DaemonConfig.model_validate(tomllib.loads(_read_text(path)))
    except OSError as error:
        raise RequestError(
            f"cannot read the configuration {path}: {error.strerror}", "apply the Ansible role nohype_host"
        ) from None
    except ValidationError as error:
        raise RequestError(f"invalid configuration {path}: {_tidy(describe(error).removeprefix(': '))}") from None
    except RecursionError:
        raise RequestError(f"configuration {path} is not TOML: its arrays or tables are nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, or an integer of thousands of digits
        raise RequestError(f"configuration {path} is not TOML: {_tidy(str(error))}") from None


def _read_text(path: Path) -> str:
    """Raises OSError, and RequestError for a long file or one that is not regular: a pipe could block indefinitely."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise RequestError(f"configuration {path} is not a regular file", "give the path of a TOML file")
        if found.st_size > _LONGEST_FILE:
            raise RequestError(f"configuration {path} has {found.st_size} bytes, limit {_LONGEST_FILE}")
        return file.read(_LONGEST_FILE).decode()


def _tidy(text: str) -> str:
    # Keys can contain control characters and have any length.
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text[:_LONGEST_MESSAGE])
    return shown if len(text) <= _LONGEST_MESSAGE else f"{shown}..."
