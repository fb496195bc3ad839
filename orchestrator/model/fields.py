"""pydantic types for names, sizes and CPU lists of requests and files, and the text of a failed validation.

Fields stay normalised text, so equal requests compare equal.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from orchestrator.errors import OrchestratorError
from orchestrator.values import CpuSet, PciAddress, Size, parse_guest_name

MAX_HOSTNAME = 64
"""HOST_NAME_MAX of Linux, gethostname(2)."""
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_MAX_FINDINGS = 20
_MAX_PATH = 200


def as_value_error(parse: Callable[[], str]) -> str:
    """Raises ValueError instead of RequestError: pydantic collects ValueErrors and adds the path of the field."""
    try:
        return parse()
    except OrchestratorError as error:
        raise ValueError(f"{error.message}; {error.hint}") from None


def check_name(text: str) -> str:
    return as_value_error(lambda: parse_guest_name(text))


def check_size(text: str) -> str:
    return as_value_error(lambda: str(Size.parse(text)))


def check_cpus(text: str) -> str:
    cpus = as_value_error(lambda: str(CpuSet.parse(text)))
    if not cpus:
        raise ValueError("no CPU is named; use the form 2-3,6-7")
    return cpus


def check_hostname(text: str) -> str:
    """RFC 1123 2.1: one label or several, in any case. The last label is not a number, since the name would be an address."""
    name = text.lower()
    labels = name.split(".")
    if len(name) > MAX_HOSTNAME or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        form = f"labels of a-z, 0-9 and inner hyphens with dots between, at most {MAX_HOSTNAME} characters, the last not a number"
        raise ValueError(f"{text!r} is not a host name: use {form}")
    return name


def check_address(text: str) -> str:
    if "/" not in text:
        raise ValueError(f"{text!r} has no prefix length; use the form 10.9.0.11/24")
    if "%" in text:
        # A zone names an interface of the local machine: it has no meaning in a guest.
        raise ValueError(f"{text!r} has a zone; omit the part from the % on")
    return str(ipaddress.ip_interface(text))


def check_interface(text: str) -> str:
    if not _INTERFACE.fullmatch(text):
        raise ValueError(f"{text!r} is not the name of a network interface; `nohype survey` shows them")
    return text


def check_cmdline(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise ValueError("a kernel command line must be printable ASCII on one line")
    return text


def check_pci_address(text: str) -> str:
    return as_value_error(lambda: str(PciAddress.parse(text)))


def check_request_id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise ValueError(f"{text!r} is not an id: 1 to 64 of a-z, A-Z, 0-9 and . _ : -, the first a letter or digit")
    return text


NameField = Annotated[str, AfterValidator(check_name)]
"""The name of a guest, image, tenant or token."""
SizeField = Annotated[str, AfterValidator(check_size)]
"""An amount of memory: 256M."""
CpuField = Annotated[str, AfterValidator(check_cpus)]
"""At least one CPU, in the kernel's list format: 2-3,6-7."""


class ValidationFailure(Protocol):
    """pydantic's ValidationError, or the API's InvalidInput."""

    def errors(self) -> Sequence[Any]:
        """One mapping per finding, with ``loc`` and ``msg``."""


def describe(error: ValidationFailure) -> str:
    """The first 20 findings on one line, each with the path of its field within the body, unless it is about several fields."""
    findings = error.errors()
    paths = (".".join(str(part)[:_MAX_PATH] for part in finding["loc"] if part != "body")[:_MAX_PATH] for finding in findings)
    texts = [
        ": ".join(filter(None, (path, finding["msg"].removeprefix("Value error, "))))
        for path, finding in zip(paths, findings[:_MAX_FINDINGS], strict=False)
    ]
    return "; ".join(texts + [f"and {len(findings) - _MAX_FINDINGS} more"] * (len(findings) > _MAX_FINDINGS))
