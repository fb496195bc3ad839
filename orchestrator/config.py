"""The daemon's configuration, /etc/nohype/nohype.toml. The Ansible host role writes it."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orchestrator.config_values import (
    CERTIFICATE_NAMES,
    check_account,
    check_certificate,
    check_file,
    check_housekeeping,
    check_interface,
    check_interfaces,
    check_listen,
    check_page_counts,
    check_page_size,
    check_path,
    check_paths,
    check_socket,
    check_token_hash,
    find_root,
)
from orchestrator.errors import RequestError
from orchestrator.model.access import Quota, Role
from orchestrator.model.fields import NameField, SizeField, describe
from orchestrator.values import DEFAULT_SOCKET, MAX_CPUS, CpuSet, Size

__all__ = ["CERTIFICATE_NAMES", "DEFAULT_CONFIG", "DaemonConfig", "Principals", "read_config"]

DEFAULT_CONFIG = Path("/etc/nohype/nohype.toml")

_LONGEST_FILE = 1 << 20
_LONGEST_MESSAGE = 2000
# NumVFs of the SR-IOV capability has 16 bits (PCIe base specification 9.3.3.7).
_MOST_VFS = 65535
_MOST_PAGES = 1 << 32

_Path = Annotated[str, AfterValidator(check_path)]
_File = Annotated[str, AfterValidator(check_file)]
_Accounts = Annotated[tuple[Annotated[str, AfterValidator(check_account)], ...], Field(strict=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class HostConfig(_Strict):
    """How the host's resources are divided.

    Attributes:
        housekeeping: CPU list for the manager, the kernel's threads and QEMU's helper threads; whole physical cores.
        uplinks: network interfaces whose virtual functions guests can get.
        page_size: huge page size of guests that request none.
        vfs_per_uplink: virtual functions to create per uplink; None for the maximum.
        reserved_pages: huge page size -> pages per node that guests do not get, such as ``{"1G" = 1}``.
    """

    housekeeping: Annotated[str, AfterValidator(check_housekeeping)]
    uplinks: Annotated[tuple[Annotated[str, AfterValidator(check_interface)], ...], AfterValidator(check_interfaces)] = Field(
        min_length=1, strict=False
    )
    page_size: Annotated[str, AfterValidator(check_page_size)] = "2M"
    vfs_per_uplink: Annotated[int, Field(ge=1, le=_MOST_VFS)] | None = None
    reserved_pages: Annotated[
        dict[Annotated[str, AfterValidator(check_page_size)], Annotated[int, Field(ge=0, le=_MOST_PAGES)]],
        BeforeValidator(check_page_counts),
    ] = {}

    @property
    def housekeeping_cpus(self) -> CpuSet:
        return CpuSet.parse(self.housekeeping)

    @property
    def page(self) -> Size:
        return Size.parse(self.page_size)

    @property
    def reserved(self) -> tuple[tuple[Size, int], ...]:
        return tuple((Size.parse(size), count) for size, count in self.reserved_pages.items())


class PathConfig(_Strict):
    """Where things are kept."""

    images: _Path = "/var/lib/nohype/images"
    ledger: _Path = "/var/lib/nohype/ledger.sqlite"
    consoles: _Path = "/var/log/nohype/guests"
    socket: Annotated[str, AfterValidator(check_socket)] = str(DEFAULT_SOCKET)

    @model_validator(mode="after")
    def _check_all(self) -> Self:
        check_paths({"ledger": self.ledger, "socket": self.socket}, {"images": self.images, "consoles": self.consoles})
        return self


class EventConfig(_Strict):
    """How much of the event log is kept.

    Attributes:
        keep: newest events per tenant and of the host; likewise for the kinds with severity warning.
    """

    keep: Annotated[int, Field(ge=1000, le=10_000_000)] = 20_000


class ExitConfig(_Strict):
    """Bounds of the ``exits`` proof, per vCPU and second, for a guest that has booted and is idle or computes.

    Attributes:
        total: all VM exits.
        emulated: exits that QEMU or KVM's emulator had to serve (port I/O and memory-mapped I/O).
    """

    total: Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)] = 2000.0
    emulated: Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)] = 10.0


class Principals(_Strict):
    """Users, groups and certificates with a role.

    Attributes:
        users: names or numbers of users who connect to the Unix socket.
        groups: names or numbers of groups; a user's supplementary groups count.
        certificates: names in client certificates: ``CN:alice`` (or only ``alice``), ``DNS:host.example``, ``URI:spiffe://...``,
            ``email:a@b.example``.
    """

    users: _Accounts = ()
    groups: _Accounts = ()
    certificates: Annotated[tuple[Annotated[str, AfterValidator(check_certificate)], ...], Field(strict=False)] = ()


class AccessConfig(_Strict):
    """Operators and viewers. Root is always an operator.

    Without this section, and without tenants, every user who can connect to the Unix socket is an operator.
    """

    operators: Principals = Principals()
    viewers: Principals = Principals()


class TenantConfig(Principals):
    """A tenant: its callers, and the quota of all its guests together; None for no limit.

    Attributes:
        cores: whole physical cores.
        memory: huge pages, as a size.
        vfs: virtual functions.
    """

    cores: Annotated[int, Field(ge=0, le=MAX_CPUS)] | None = None
    memory: SizeField | None = None
    vfs: Annotated[int, Field(ge=0, le=_MOST_VFS)] | None = None

    @property
    def quota(self) -> Quota:
        return Quota(self.cores, Size.parse(self.memory) if self.memory else None, self.vfs)


class TokenConfig(_Strict):
    """A bearer token; `nohype token new` creates one.

    Attributes:
        hash: SHA-256 of the token, ``sha256:`` and 64 hexadecimal digits. The token itself is not stored.
        tenant: required with role "tenant".
    """

    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$"), AfterValidator(check_token_hash)]
    role: Annotated[Role, Field(strict=False)]
    tenant: str = ""


class ApiConfig(_Strict):
    """The manager's TLS port; without this section there is only the Unix socket.

    Attributes:
        listen: address and port: ``192.0.2.1:8443``, ``[::]:8443``.
        certificate: PEM file with the manager's certificate and the intermediate ones.
        key: PEM file with the private key, readable only by root.
        client_ca: PEM file with the CAs of client certificates; None: only tokens are accepted.
    """

    listen: Annotated[str, AfterValidator(check_listen)]
    certificate: _File
    key: _File
    client_ca: _File | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class LimitConfig(_Strict):
    """Limits of one client; all callers of a tenant are one. For operators only ``body`` and ``nesting`` apply.

    Attributes:
        rate: requests per second.
        burst: requests at the same time after a pause.
        concurrent: requests in progress, of each of three kinds: waits (with streams of events), kill and delete, all others.
        body: maximum length of a body.
        nesting: maximum nesting of JSON.
    """

    rate: Annotated[float, Field(ge=1e-3, le=1e6, strict=False)] = 50.0
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    concurrent: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    body: SizeField = "64K"
    nesting: Annotated[int, Field(ge=1, le=100)] = 16

    @property
    def body_bytes(self) -> int:
        return Size.parse(self.body).bytes


class DaemonConfig(_Strict):
    """The whole file."""

    host: HostConfig
    paths: PathConfig = PathConfig()
    exits: ExitConfig = ExitConfig()
    events: EventConfig = EventConfig()
    access: AccessConfig | None = None
    tenants: dict[NameField, TenantConfig] = {}
    tokens: dict[NameField, TokenConfig] = {}
    api: ApiConfig | None = None
    limits: LimitConfig = LimitConfig()

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        for name, token in self.tokens.items():
            if (token.role is Role.TENANT) != bool(token.tenant):
                raise ValueError(f"tokens.{name}: a tenant is required with role tenant, otherwise not allowed")
            if token.tenant and token.tenant not in self.tenants:
                raise ValueError(f"tokens.{name}: [tenants.{token.tenant}] does not exist")
        for _, first, second in _find_duplicates((token.hash, name) for name, token in self.tokens.items()):
            raise ValueError(f"tokens.{second}: same hash as tokens.{first}; create another token")
        for where, people in self._people():
            if where != "access.operators" and (root := find_root(people.users)):
                raise ValueError(f"{where}.users: {root!r} is root, which is always an operator; remove it")
        for kind in ("users", "groups", "certificates"):
            # One account has one role, or one tenant; two would be ambiguous.
            for one, first, second in _find_duplicates(
                (one, where) for where, named in self._people() for one in getattr(named, kind)
            ):
                raise ValueError(f"{second}.{kind}: {one!r} is already in {first}")
        with_certificate = [where for where, people in self._people() if people.certificates]
        if self.api and not self.api.client_ca and with_certificate:
            raise ValueError(f"api.client_ca is required: {with_certificate[0]} lists client certificates")
        if self.api and not self.tokens and not with_certificate:
            raise ValueError("api: no credentials are configured for this port; add certificates or run `nohype token new`")
        return self

    def _people(self) -> list[tuple[str, Principals]]:
        access = self.access or AccessConfig()
        named: list[tuple[str, Principals]] = [("access.operators", access.operators), ("access.viewers", access.viewers)]
        return named + [(f"tenants.{name}", tenant) for name, tenant in self.tenants.items()]


def _find_duplicates(places: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Values that occur in two sections, with the first and the other section."""
    seen: dict[str, str] = {}
    for one, where in places:
        if seen.setdefault(one, where) != where:
            yield one, seen[one], where


def read_config(path: Path) -> DaemonConfig:
    """Reads the daemon's configuration.

    Raises:
        RequestError: the file cannot be read, is not TOML, or has an invalid field; with the path of the field.
    """
    try:
        return DaemonConfig.model_validate(tomllib.loads(_read_text(path)))
    except OSError as error:
        raise RequestError(f"cannot read the configuration {path}: {error.strerror}", "the Ansible host role writes it") from None
    except ValidationError as error:
        raise RequestError(f"invalid configuration {path}: {_tidy(describe(error).removeprefix(': '))}") from None
    except RecursionError:
        raise RequestError(f"configuration {path} is not TOML: its arrays or tables are nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, or an integer of thousands of digits
        raise RequestError(f"configuration {path} is not TOML: {_tidy(str(error))}") from None


def _read_text(path: Path) -> str:
    """The text of a regular file; reading a pipe or a device could block indefinitely.

    Raises:
        OSError: it cannot be read.
        RequestError: it is not a regular file, or too long.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise RequestError(f"configuration {path} is not a regular file", "give the path of a TOML file")
        if found.st_size > _LONGEST_FILE:
            raise RequestError(f"configuration {path} has {found.st_size} bytes, limit {_LONGEST_FILE}")
        return file.read(_LONGEST_FILE).decode()


def _tidy(text: str) -> str:
    """On one line of limited length, with control characters escaped: keys can contain anything."""
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text[:_LONGEST_MESSAGE])
    return shown if len(text) <= _LONGEST_MESSAGE else f"{shown}..."
