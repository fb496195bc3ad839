"""Reads the body of a request: its size is limited, and it must be JSON with one meaning."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from starlette.types import Receive

from orchestrator.client.problems import WrongMedia
from orchestrator.errors import RequestError, TooLarge

_ARRIVES = 30.0
# Possessive, and a string need not end: each character is read once, whatever the client sends.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+\\?"?|[\[{]|[\]}]|,', re.DOTALL)
# Strings, lists, objects and commas in one body. A request for a guest has some 40; three can cause one error message.
_MAX_ELEMENTS = 512
_MAX_DIGITS = 40
_CODINGS = ("", "identity")
_CHARSETS = ("", "utf-8")
_MAX_MEDIA_TYPE = 200


class ClientDisconnected(Exception):
    """The client closed the connection before its request was complete. Nothing was done for it."""


async def read_body(receive: Receive, length: str | None, limit: int, arrived: bytes | None = None) -> bytes:
    """
    Args:
        length: the Content-Length field; None without one (chunked).
        limit: bytes.
        arrived: the whole body if it has arrived already.

    Raises:
        TooLarge: the body is longer than the limit.
        RequestError: the body does not arrive within 30 s.
        ClientDisconnected
    """
    too_long = TooLarge(f"request body exceeds {limit} bytes", "see [limits] body in the configuration")
    if length and int(length) > limit:
        raise too_long
    if arrived is not None:
        return arrived
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_ARRIVES):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise too_long
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(f"request body did not arrive within {_ARRIVES:g} s") from None


def check_media_type(media_type: str, coding: str) -> None:
    """Raises WrongMedia if the body is not JSON, not UTF-8 or compressed (RFC 9110 8.4, 15.5.16)."""
    if coding.strip().lower() not in _CODINGS:
        raise WrongMedia(f"unsupported Content-Encoding {coding[:80]!r}", "send the body without Content-Encoding")
    kind, *parameters = media_type.split(";")
    if kind.strip().lower() != "application/json" or len(media_type) > _MAX_MEDIA_TYPE:
        raise WrongMedia(
            f"unsupported Content-Type {media_type[:80]!r}" if media_type else "Content-Type is missing",
            "send Content-Type: application/json",
        )
    for name, _, value in (parameter.strip().partition("=") for parameter in parameters):
        if name.strip().lower() == "charset" and value.strip(' \t"').lower() not in _CHARSETS:
            raise WrongMedia(f"unsupported charset {value[:80]!r}", "send UTF-8")


def parse_json(body: bytes, nesting: int) -> Any:
    """The value of the body. Refuses JSON that parsers read differently (RFC 8259 4, 6, 8.2) or that takes long to parse.

    Raises:
        RequestError: not UTF-8, not JSON, a duplicate name, NaN, infinity, an unpaired surrogate.
        TooLarge: nested deeper than ``nesting``, or more than 512 elements.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"invalid UTF-8 at byte {error.start} of the body") from None
    _check_structure(text, nesting)
    try:
        value: Any = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )  # fmt: skip
        if "\\u" in text:  # UTF-8 itself has no surrogates
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RequestError(f"invalid JSON: {error.msg} at character {error.pos}") from None
    except UnicodeEncodeError:
        raise RequestError("body contains an unpaired surrogate") from None
    return value


def _check_structure(text: str, nesting: int) -> None:
    """Runs before any object is built from the text; stops at the first element beyond a limit."""
    depth, elements = 0, 0
    for token in _TOKEN.finditer(text):
        sign = token[0]
        if sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
            continue
        # Numbers have no token of their own: a comma stands between two.
        elements += 1
        if depth > nesting:
            raise TooLarge(f"request body is nested deeper than {nesting} levels", "see [limits] nesting in the configuration")
        if elements > _MAX_ELEMENTS:
            raise TooLarge(f"request body has more than {_MAX_ELEMENTS} elements", "send fewer")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise RequestError(f"duplicate member {name[:80]!r} in an object")
        fields[name] = value
    return fields


def _no_constant(text: str) -> NoReturn:
    raise RequestError(f"invalid JSON: {text} is not allowed")


def _finite(text: str) -> float:
    if len(text) > _MAX_DIGITS:
        raise RequestError(f"number with too many digits: {text[:_MAX_DIGITS]}...")
    number = float(text)
    if not math.isfinite(number):
        raise RequestError(f"number too large: {text[:40]}")
    return number


def _integer(text: str) -> int:
    if len(text) > 20:
        raise RequestError(f"number too large: {text[:20]}...")
    return int(text)
