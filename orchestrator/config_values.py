"""Checks single configuration values. Each function returns the normalised value, or raises ValueError."""

from __future__ import annotations

import hashlib
import os.path
import re
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from orchestrator.model.edge import EDGE_SETTINGS
from orchestrator.model.fields import check_cpus, check_size
from orchestrator.model.network import describe_vlans, parse_vlans
from orchestrator.model.url import parse_url
from orchestrator.values import MAX_CPUS, CpuSet, Size

# The kinds of names in a certificate that can be mapped to an identity (RFC 5280 4.1.2.6, 4.2.1.6).
CERTIFICATE_NAMES = ("CN", "DNS", "URI", "email")

ROOT_USERS = frozenset({"0", "root"})

_PAGE_SIZES = (Size.parse("2M"), Size.parse("1G"))
# Without the final zero byte: PATH_MAX (linux/limits.h), sun_path (unix(7)), IFNAMSIZ (linux/if.h).
_LONGEST_PATH, _LONGEST_SOCKET, _LONGEST_INTERFACE = 4095, 107, 15
_LONGEST_ACCOUNT = 256
# (uid_t) -1 means "no change" in chown(2) and setresuid(2).
_HIGHEST_ACCOUNT = 2**32 - 2
_VOLUME_GROUP = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,63}", re.ASCII)
_EMPTY_TOKEN = "sha256:" + hashlib.sha256(b"").hexdigest()
# Suffixes of the files and the folder that SQLite and the manager create next to the ledger.
_LEDGER_SUFFIXES = ("-wal", "-shm", "-journal", ".lock", ".reserve", ".secrets")


class StrictModel(BaseModel):
    """One section."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def check_housekeeping(text: str) -> str:
    cpus = check_cpus(text)
    if len(CpuSet.parse(cpus)) == MAX_CPUS:
        raise ValueError(f"{cpus} are all CPUs that the kernel supports; no CPU is left for guests")
    return cpus


def check_page_size(text: str) -> str:
    # Documentation/admin-guide/mm/hugetlbpage.rst, x86-64
    size = check_size(text)
    if Size.parse(size) not in _PAGE_SIZES:
        raise ValueError(f"{text!r} is not a huge page size; use {' or '.join(map(str, _PAGE_SIZES))}")
    return size


def check_page_counts(counts: object) -> object:
    """Refuses a page size that is given in two spellings: one count would be lost. Must run before the keys are normalised."""
    seen: dict[str, str] = {}
    for text in counts if isinstance(counts, Mapping) else ():
        if isinstance(text, str):
            first = seen.setdefault(check_page_size(text), text)
            if first != text:
                raise ValueError(f"{first!r} and {text!r} are the same page size; keep one of them")
    return counts


def check_certificate(text: str) -> str:
    """The default kind is CN."""
    kind, colon, value = text.partition(":")
    if not colon:
        kind, value = "CN", text
    if kind not in CERTIFICATE_NAMES or not value or not value.isprintable():
        raise ValueError(f"invalid certificate name {text!r}: use {', '.join(f'{kind}:...' for kind in CERTIFICATE_NAMES)}")
    return f"{kind}:{value}"


def check_vlans(text: str) -> str:
    return describe_vlans(parse_vlans(text))


def check_server(text: str) -> str:
    """A folder of a boot server: https://boot.example/images/"""
    parse_url(text)
    return text


def check_token_hash(text: str) -> str:
    """Refuses the hash of the empty token, which every request with an empty token would match."""
    if text == _EMPTY_TOKEN:
        raise ValueError("this is the hash of an empty token; create a token with `nohype token new`")
    return text


def check_listen(text: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise ValueError(f"invalid listen address {text!r}: use 192.0.2.1:8443 or [::]:8443")
    return text


def check_interface(text: str) -> str:
    """As dev_valid_name() in net/core/dev.c, and printable ASCII."""
    odd = {"/", ":", " "} & set(text)
    if not text or text in (".", "..") or odd or not (text.isascii() and text.isprintable()) or len(text) > _LONGEST_INTERFACE:
        raise ValueError(f"{_shorten(text)} is not the name of a network interface: 1 to 15 visible characters, without / and :")
    return text


def check_interfaces(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is listed {names.count(name)} times; keep one of them")
    return names


def check_edge(text: str) -> str:
    if text not in EDGE_SETTINGS:
        raise ValueError(f"{_shorten(text)} is not an edge mode for guests; use {', '.join(EDGE_SETTINGS)}")
    return text


def check_path(text: str) -> str:
    # Absolute: a relative path would depend on the working directory.
    if not text.startswith("/") or not text.isprintable() or ".." in text.split("/"):
        raise ValueError(f"{_shorten(text)} is not an absolute path without '..' and control characters")
    path = os.path.normpath(text).replace("//", "/")
    if path == "/":
        raise ValueError("/ is the root directory; name a file or folder in it")
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"a path of {len(os.fsencode(path))} bytes is too long; the kernel takes {_LONGEST_PATH}")
    return path


PathField = Annotated[str, AfterValidator(check_path)]


def check_volume_group(text: str) -> str:
    # lvm(8), "Valid names".
    if not _VOLUME_GROUP.fullmatch(text) or text in (".", ".."):
        raise ValueError(f"{_shorten(text)} is not the name of an LVM volume group; `vgs` shows them")
    return text


def check_file(text: str) -> str:
    """The path may be relative."""
    if not text or not text.isprintable():
        raise ValueError(f"{_shorten(text)} is not a path")
    return text


def check_socket(text: str) -> str:
    path = check_path(text)
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        raise ValueError(f"a socket's path has {_LONGEST_SOCKET} bytes at most, this one {len(os.fsencode(path))}: unix(7)")
    return path


def check_paths(files: Mapping[str, str], folders: Mapping[str, str]) -> None:
    """Refuses paths that conflict. ``files`` and ``folders`` are by field; ``ledger`` is one of the files."""
    seen: dict[str, str] = {}
    for field, path in {**files, **folders}.items():
        first = seen.setdefault(path, field)
        if first != field:
            raise ValueError(f"{first} and {field} are the same path {path}")
        for file, where in files.items():
            if path.startswith(f"{where}/"):
                raise ValueError(f"{field} is below {where}, which is the file of {file}")
        if path in {files["ledger"] + suffix for suffix in _LEDGER_SUFFIXES}:
            raise ValueError(f"{field} is {path}, which belongs to the ledger")


def check_account(text: str) -> str:
    if text.isascii() and text.isdigit():
        # The length first: Python refuses to convert more than 4300 digits.
        number = int(text) if len(text) <= _LONGEST_ACCOUNT else _HIGHEST_ACCOUNT + 1
        if number > _HIGHEST_ACCOUNT:
            raise ValueError(f"{_shorten(text)} is too high for the number of a user or group: 0 to {_HIGHEST_ACCOUNT}")
        return str(number)
    spaces = text != text.strip()
    if not text or spaces or ":" in text or text.isdecimal() or not text.isprintable() or len(text) > _LONGEST_ACCOUNT:
        raise ValueError(f"{_shorten(text)} is not the name or number of a user or group")
    return text


def find_root(users: Iterable[str]) -> str | None:
    """An entry for root; does not query the host's name service."""
    return next((user for user in users if user in ROOT_USERS), None)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
