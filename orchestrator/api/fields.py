"""Parses If-Match and query parameters, and refuses parts of a request that its route does not use.

Otherwise unknown parts would be ignored silently: `DELETE` with `{"dry_run": true}` would delete.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator
from starlette.requests import Request

from orchestrator.api.parameters import NO_BODY, Call, Depends, Header, Parameter
from orchestrator.errors import RequestError

_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e]*)"')
# As the manager writes them: tags are compared character by character (RFC 9110 8.8.3.2), so "03" differs from "3".
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_SHOWN = 80
_MAX_IF_MATCH = 1000
# JSON's grammar (RFC 8259 6): pydantic also accepts "1_0", " 1 ", "+5" and "1.0" as integers, and "nan".
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,19})")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,19})(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,3})?")

_IfMatchField = Annotated[
    str | None, Header(description='Only if the guest\'s ETag is still this one: "7". `*` is any.', max_length=_MAX_IF_MATCH)
]


def parse_if_match(field: str | None) -> frozenset[int] | None:
    """The versions that an If-Match field lists; None for any (RFC 9110 13.1.1). Raises RequestError if it is malformed.

    Weak tags, and tags of another form, match no guest: the set can be empty.
    """
    if field is None or field.strip() == "*":
        return None
    # Empty list elements must be ignored (RFC 9110 5.6.1.2).
    parts = [part for one in field.split(",") if (part := one.strip(" \t"))]
    tags = [_TAG.fullmatch(part) for part in parts]
    if not tags or None in tags:
        raise RequestError(f"malformed If-Match {field[:_SHOWN]!r}", 'send the ETag unchanged, with its quotes: "7"')
    return frozenset(int(tag[2]) for tag in tags if tag and not tag[1] and _VERSION.fullmatch(tag[2]))


async def _read_if_match(request: Request, if_match: _IfMatchField = None) -> frozenset[int] | None:
    # Several lines are one list (RFC 9110 5.3); the framework passes only the first.
    field = None if if_match is None else ", ".join(request.headers.getlist("if-match"))
    if field and len(field) > _MAX_IF_MATCH:
        raise RequestError(f"If-Match is longer than {_MAX_IF_MATCH} characters", "list fewer versions")
    return parse_if_match(field)


def _check_integer(value: object) -> object:
    if isinstance(value, str) and not _INTEGER.fullmatch(value):
        raise ValueError("not an integer in decimal digits, such as 0 or 25")
    return value


def _check_number(value: object) -> object:
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise ValueError("not a number in decimal digits, such as 2 or 0.5")
    return value


def _check_boolean(value: object) -> object:
    if isinstance(value, str) and value not in ("true", "false"):
        raise ValueError("not true or false")
    return value


# Query values, each with one accepted spelling.
Integer = Annotated[int, BeforeValidator(_check_integer)]
Number = Annotated[float, BeforeValidator(_check_number)]
Boolean = Annotated[bool, BeforeValidator(_check_boolean)]

IfMatch = Annotated[frozenset[int] | None, Depends(_read_if_match)]


@dataclass(frozen=True)
class Known:
    """The parts of a request that a route uses."""

    query: frozenset[str]
    headers: frozenset[str]
    body: bool


def find_known(call: Call) -> Known:
    return Known(_names(call, lambda one: one.query), _names(call, lambda one: one.headers), call.body is not None)


def reject_unknown_input(request: Request, known: Known) -> None:
    """Raises RequestError for a body or If-Match that the route does not use, and for query parameters unknown or given twice.

    ``{}`` counts as no body: programs that always send JSON send it.
    """
    if request.scope["query_string"]:
        _check_query(request, known.query)
    if "if-match" not in known.headers and request.method != "GET" and "if-match" in request.headers:
        raise RequestError("this endpoint takes no If-Match", "omit it")
    if not known.body and request.scope["state"]["body"] not in (NO_BODY, {}):
        raise RequestError("this endpoint takes no body", "omit it")


def _check_query(request: Request, known: frozenset[str]) -> None:
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known:
            hint = f"known parameters: {', '.join(sorted(known))}" if known else "this endpoint takes no query parameters"
            raise RequestError(f"unknown query parameter {name[:_SHOWN]!r}", hint)
        if count > 1:
            raise RequestError(f"query parameter {name!r} is given {count} times", "give it once")


def _names(call: Call, choose: Callable[[Call], tuple[Parameter, ...]]) -> frozenset[str]:
    own = (parameter.alias.lower() for parameter in choose(call))
    return frozenset(own).union(*(_names(one, choose) for _, one in call.needs))
