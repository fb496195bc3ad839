"""What a user asks for, checked strictly: extra fields and silent conversions are refused."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.values import Size, parse_guest_name

_MAX_CMDLINE = 1024


def _name(text: str) -> str:
    return as_value_error(lambda: parse_guest_name(text))


def _size(text: str) -> str:
    as_value_error(lambda: str(Size.parse(text)))
    return text


def _address(text: str) -> str:
    if "/" not in text:
        raise ValueError(f"{text!r} has no prefix length; write it like 10.9.0.11/24")
    if "%" in text:
        # A zone may hold any text, and names an interface of the machine that reads it: it means nothing in a guest.
        raise ValueError(f"{text!r} has a zone; leave out what follows the %")
    return str(ipaddress.ip_interface(text))


def _cmdline(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise ValueError("a kernel command line is printable ASCII on one line")
    return text


def as_value_error(parse: Callable[[], str]) -> str:
    """Runs one of our parsers for pydantic, which collects ValueErrors and adds the path of the field."""
    try:
        return parse()
    except OrchestratorError as error:
        raise ValueError(f"{error.message}; {error.hint}") from None


class GuestRequest(BaseModel):
    """A guest as its owner asks for it.

    Attributes:
        name: 1 to 40 of a-z, 0-9 and inner hyphens.
        cores: whole physical cores; on a host with SMT the guest sees each core's threads as vCPUs.
        memory: fixed for the guest's life; a whole number of huge pages ("256M").
        image: name of a built guest image.
        address: address and prefix length that the guest gives its network interface, or None.
        cmdline: further words for the guest's kernel command line.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(_name)]
    cores: Annotated[int, Field(ge=1, le=1024)] = 1
    memory: Annotated[str, AfterValidator(_size)]
    image: Annotated[str, AfterValidator(_name)]
    address: Annotated[str, AfterValidator(_address)] | None = None
    cmdline: Annotated[str, Field(max_length=_MAX_CMDLINE), AfterValidator(_cmdline)] = ""

    @property
    def size(self) -> Size:
        """The memory as a value."""
        return Size.parse(self.memory)


def parse_guest_request(fields: dict[str, object]) -> GuestRequest:
    """Reads a request from untrusted JSON or from the command line.

    Raises:
        RequestError: one line that names each wrong field and what is wrong with it.
    """
    try:
        return GuestRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestError("the request is wrong: " + describe(error)) from None


class Findings(Protocol):
    """What pydantic's ValidationError and FastAPI's RequestValidationError have in common."""

    def errors(self) -> Sequence[Any]:
        """One mapping a finding, with ``loc`` and ``msg``."""


def describe(error: Findings) -> str:
    """All findings of a validation on one line, each with the path of its field (within the body, where there is one)."""
    return "; ".join(
        ".".join(str(part) for part in item["loc"] if part != "body") + ": " + item["msg"].removeprefix("Value error, ")
        for item in error.errors()
    )
