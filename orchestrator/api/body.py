"""The body of a request, before anything else looks at it: not too long, and JSON that means one thing only."""

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
# Possessive, and a string need not end: each character is looked at once, whatever is sent.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+\\?"?|[\[{]|[\]}]|,', re.DOTALL)
_MAX_ELEMENTS = 512
"""Strings, lists, objects and commas in one body. A request for a guest has some 40; three more can cost an error message."""
_MAX_DIGITS = 40
_CODINGS = ("", "identity")
_CHARSETS = ("", "utf-8")
_MAX_MEDIA_TYPE = 200


class ClientDisconnected(Exception):
    """The client has closed the connection before its request was complete. Nothing was done for it."""


async def read_body(receive: Receive, length: str | None, limit: int) -> bytes:
    """Reads the whole body.

    Args:
        receive: of the ASGI connection.
        length: the Content-Length field, None if there is none (chunked).
        limit: bytes.

    Raises:
        TooLarge: it is longer than the limit.
        RequestError: it does not arrive within 30 s.
        ClientDisconnected: see there.
    """
    too_long = TooLarge(f"the request's body is longer than {limit} bytes", "no request needs so many")
    if length and int(length) > limit:
        raise too_long
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
        raise RequestError(f"the request's body did not arrive within {_ARRIVES:g} s") from None


def check_media_type(media_type: str, coding: str) -> None:
    """Refuses a body that would have to be decoded before it is JSON in UTF-8.

    Args:
        media_type: the Content-Type field.
        coding: the Content-Encoding field.

    Raises:
        WrongMedia: the body is not JSON, is in another charset, or is compressed (RFC 9110 8.4, 15.5.16).
    """
    if coding.strip().lower() not in _CODINGS:
        raise WrongMedia(f"the Content-Encoding {coding[:80]!r} is not supported", "send the body without Content-Encoding")
    kind, *parameters = media_type.split(";")
    if kind.strip().lower() != "application/json" or len(media_type) > _MAX_MEDIA_TYPE:
        raise WrongMedia(f"the body is said to be {media_type[:80] or 'of no type'!r}", "send Content-Type: application/json")
    for name, _, value in (parameter.strip().partition("=") for parameter in parameters):
        if name.strip().lower() == "charset" and value.strip(' \t"').lower() not in _CHARSETS:
            raise WrongMedia(f"the charset {value[:80]!r} is not supported", "send UTF-8, which is the only charset of JSON")


def check_json(body: bytes, nesting: int) -> None:
    """Refuses what programs read in different ways, or can't read at all, and what takes long to read.

    Raises:
        RequestError: no UTF-8, no JSON, a name twice in one object, NaN, infinity, half a surrogate pair (RFC 8259 4, 6, 8.2).
        TooLarge: nested more deeply than ``nesting``, or more elements than any request needs.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is wrong") from None
    _check_structure(text, nesting)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )  # fmt: skip
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeEncodeError:
        raise RequestError("the body holds half a surrogate pair, which is no character") from None


def _check_structure(text: str, nesting: int) -> None:
    """Before anything is built of it. Stops at the first sign that is too many."""
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
            raise TooLarge(f"the body is nested more than {nesting} levels deep", "no request needs so many")
        if elements > _MAX_ELEMENTS:
            raise TooLarge(f"the body has more than {_MAX_ELEMENTS} elements", "no request needs so many")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise RequestError(f"the body has the name {name[:80]!r} twice in one object")
        fields[name] = value
    return fields


def _no_constant(text: str) -> NoReturn:
    raise RequestError(f"the body is not JSON: {text} is no number")


def _finite(text: str) -> float:
    if len(text) > _MAX_DIGITS:
        raise RequestError(f"the body holds a number with too many digits: {text[:_MAX_DIGITS]}...")
    number = float(text)
    if not math.isfinite(number):
        raise RequestError(f"the body holds a number that is too large: {text[:40]}")
    return number


def _integer(text: str) -> int:
    if len(text) > 20:
        raise RequestError(f"the body holds a number that is too large: {text[:20]}...")
    return int(text)
