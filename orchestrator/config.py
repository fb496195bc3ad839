"""The daemon's configuration, /etc/nohype/nohype.toml. The host role of Ansible writes it."""

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

__all__ = ["CERTIFICATE_NAMES", "DEFAULT_CONFIG", "DaemonConfig", "People", "read_config"]

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
    """How the host is divided.

    Attributes:
        housekeeping: CPU list for the manager, the kernel's threads and QEMU's helper threads; whole physical cores.
        uplinks: network interfaces whose virtual functions may be given to guests.
        page_size: huge page size that guests get who ask for none.
        vfs_per_uplink: how many virtual functions to make on an uplink; left out: as many as it can have.
        reserved_pages: huge page size -> how many pages of each node guests do not get, such as ``{"1G" = 1}``: the host's share.
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
        """The housekeeping CPUs as a value."""
        return CpuSet.parse(self.housekeeping)

    @property
    def page(self) -> Size:
        """The page size as a value."""
        return Size.parse(self.page_size)

    @property
    def reserved(self) -> tuple[tuple[Size, int], ...]:
        """The reserved pages as values."""
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
        keep: newest events of each tenant, and of the host itself; and as many of those kinds that are rarer and tell of trouble.
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


class People(_Strict):
    """Who may act in a role.

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
    """Who may do everything, and who may look at everything. Root may do everything always.

    Without this section, and without tenants, whoever can open the Unix socket may do everything.
    """

    operators: People = People()
    viewers: People = People()


class TenantConfig(People):
    """A customer: who acts for it, and the most that its guests together may own; left out: no bound.

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
        """The bounds as a value."""
        return Quota(self.cores, Size.parse(self.memory) if self.memory else None, self.vfs)


class TokenConfig(_Strict):
    """A bearer token; `nohype token new` makes one.

    Attributes:
        hash: SHA-256 of the token, ``sha256:`` and 64 hexadecimal digits. The token itself is nowhere.
        role: what its bearer may do.
        tenant: for whom, if the role is "tenant".
    """

    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$"), AfterValidator(check_token_hash)]
    role: Annotated[Role, Field(strict=False)]
    tenant: str = ""


class ApiConfig(_Strict):
    """The manager's TLS port; without this section there is only the Unix socket.

    Attributes:
        listen: address and port: ``192.0.2.1:8443``, ``[::]:8443``.
        certificate: PEM file with the manager's certificate and those that lead to its CA.
        key: PEM file with the private key, readable by root alone.
        client_ca: PEM file with the CAs whose client certificates are believed; left out: only tokens are taken.
    """

    listen: Annotated[str, AfterValidator(check_listen)]
    certificate: _File
    key: _File
    client_ca: _File | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class LimitConfig(_Strict):
    """How much one client may ask for. Operators are bound by ``body`` and ``nesting`` only.

    Attributes:
        rate: requests a second; all who act for one tenant count as one.
        burst: requests at once after a pause.
        concurrent: requests that are worked on at a time, of each of three kinds: waits (streams of events among them), ends of
            guests, and all others.
        body: longest body of a request.
        nesting: deepest nesting of JSON.
    """

    rate: Annotated[float, Field(ge=1e-3, le=1e6, strict=False)] = 50.0
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    concurrent: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    body: SizeField = "64K"
    nesting: Annotated[int, Field(ge=1, le=100)] = 16

    @property
    def body_bytes(self) -> int:
        """The longest body in bytes."""
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
                raise ValueError(f"tokens.{name}: a token has a tenant if its role is tenant, and only then")
            if token.tenant and token.tenant not in self.tenants:
                raise ValueError(f"tokens.{name}: there is no [tenants.{token.tenant}]")
        for _, first, second in _find_doubles((token.hash, name) for name, token in self.tokens.items()):
            raise ValueError(f"tokens.{second}: it is the same token as tokens.{first}; make another")
        for where, people in self._people():
            if where != "access.operators" and (root := find_root(people.users)):
                raise ValueError(f"{where}.users: {root!r} is root, who is always an operator")
        for kind in ("users", "groups", "certificates"):
            # One account has one role, or acts for one tenant: which one is meant could not be told.
            for one, first, second in _find_doubles(
                (one, where) for where, named in self._people() for one in getattr(named, kind)
            ):
                raise ValueError(f"{second}.{kind}: {one!r} is in {first} already")
        with_certificate = [where for where, people in self._people() if people.certificates]
        if self.api and not self.api.client_ca and with_certificate:
            raise ValueError(f"api.client_ca: certificates are named in {with_certificate[0]}, but no CA of theirs")
        if self.api and not self.tokens and not with_certificate:
            raise ValueError("api: nobody could use this port; name certificates, or make a token with `nohype token new`")
        return self

    def _people(self) -> list[tuple[str, People]]:
        access = self.access or AccessConfig()
        named: list[tuple[str, People]] = [("access.operators", access.operators), ("access.viewers", access.viewers)]
        return named + [(f"tenants.{name}", tenant) for name, tenant in self.tenants.items()]


def _find_doubles(places: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Of values and where they stand: those that stand in two places, with the first and the other."""
    seen: dict[str, str] = {}
    for one, where in places:
        if seen.setdefault(one, where) != where:
            yield one, seen[one], where


def read_config(path: Path) -> DaemonConfig:
    """Reads the daemon's configuration.

    Raises:
        RequestError: no such file, no TOML, or a wrong field; with the file's name and the field's path.
    """
    try:
        return DaemonConfig.model_validate(tomllib.loads(_read_text(path)))
    except OSError as error:
        raise RequestError(f"cannot read the configuration {path}: {error.strerror}", "the Ansible host role writes it") from None
    except ValidationError as error:
        raise RequestError(f"the configuration {path} is wrong: {_tidy(describe(error).removeprefix(': '))}") from None
    except RecursionError:
        raise RequestError(f"the configuration {path} is not TOML: its arrays or tables are nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, or an integer of thousands of digits
        raise RequestError(f"the configuration {path} is not TOML: {_tidy(str(error))}") from None


def _read_text(path: Path) -> str:
    """The text of a regular file: a pipe could keep us waiting, and a device never end.

    Raises:
        OSError: it can't be read.
        RequestError: it is something else, or too long.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise RequestError(f"the configuration {path} is not a regular file", "give the path of a TOML file")
        if found.st_size > _LONGEST_FILE:
            raise RequestError(f"the configuration {path} has {found.st_size} bytes, more than {_LONGEST_FILE}")
        return file.read(_LONGEST_FILE).decode()


def _tidy(text: str) -> str:
    """On one line that is not too long, and without what a terminal would act on: keys may hold anything."""
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text[:_LONGEST_MESSAGE])
    return shown if len(text) <= _LONGEST_MESSAGE else f"{shown}..."
