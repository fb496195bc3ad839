"""Reads responses with a maximum length and checks them against the types of `shapes`: any program may listen at the address."""

from __future__ import annotations

import contextlib
import copy
import functools
import http.client
import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from orchestrator.client import shapes
from orchestrator.client.added import Added
from orchestrator.client.problems import MEDIA_TYPE, parse_problem
from orchestrator.errors import OrchestratorError

# A thousand events of maximum length, or the survey of a large server, take 2 MB.
MAX_ANSWER = 64 << 20
_MAX_LINE = 1 << 20
_PIECE = 64 << 10
_NO_CONTENT = 204


def read_answer(response: http.client.HTTPResponse, kind: Any) -> Any:
    """The content of a successful response; ``kind`` is a type of `shapes`, or None for no content.

    Raises OrchestratorError if the content is of another type.
    """
    content = read_content(response)
    if kind is None:
        if response.status == _NO_CONTENT and not content:
            return None
    elif (value := _parse(response, content, "application/json")) is not None and has_shape(value, kind):
        return value
    raise _wrong(response)


def read_problem(response: http.client.HTTPResponse) -> OrchestratorError:
    """The error in a response. Raises OrchestratorError if the content is not a problem document."""
    document = _parse(response, read_content(response), MEDIA_TYPE)
    if not isinstance(document, dict):
        raise _wrong(response)
    return parse_problem(document)


def read_text(response: http.client.HTTPResponse) -> str:
    """Raises OrchestratorError if the content is not text/plain in UTF-8."""
    content = read_content(response)
    with contextlib.suppress(UnicodeDecodeError):
        if response.headers.get_content_type() == "text/plain":
            return content.decode()
    raise _wrong(response)


def read_content(response: http.client.HTTPResponse) -> bytes:
    """Raises OrchestratorError above 64 MB, and http.client.IncompleteRead if the connection ends early."""
    parts: list[bytes] = []
    size = 0
    while part := response.read(_PIECE):
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER:
            raise OrchestratorError(f"response longer than {MAX_ANSWER >> 20} MB: not a NoHype manager", "check the address")
    if response.length:
        # Without Content-Length, http.client raises by itself.
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def check_stream(response: http.client.HTTPResponse) -> None:
    """Raises OrchestratorError for another content type than that of an event stream."""
    if response.headers.get_content_type() != "text/event-stream":
        raise _wrong(response)


def parse_stream(lines: typing.IO[bytes] | http.client.HTTPResponse, kind: Any = shapes.Event) -> Iterator[Any]:
    """Yields the data of events, which are of a type of `shapes`; ignores comments and other fields.

    Raises OrchestratorError if the content is not an event stream.
    """
    data: list[str] = []
    size = 0
    while line := lines.readline(_MAX_LINE):
        size += len(line)
        if size > _MAX_LINE:
            raise _wrong_stream()
        try:
            name, _, value = line.decode().rstrip("\n").partition(":")
            event = json.loads("\n".join(data)) if not name and not value and data else None
        except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise _wrong_stream() from None
        if name == "data":
            data.append(value.removeprefix(" "))
        elif not name:
            # The end of an event, or a comment.
            size = 0 if not data or event else size
            if event is not None:
                data = []
                if not has_shape(event, kind):
                    raise _wrong_stream()
                yield event


def has_shape(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type of `shapes`.

    Accepts unknown members and words: a newer manager can send them. Adds the members that an older manager does not send.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(has_shape(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(has_shape(item, arguments[1]) for item in value.values())
    if origin is Literal:
        return type(value) in {type(argument) for argument in arguments}
    if origin in (Union, types.UnionType):
        return any(has_shape(value, one) for one in arguments)
    if typing.is_typeddict(kind):
        return isinstance(value, dict) and all(_has_member(value, name, one) for name, one in _read_hints(kind).items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return kind is object or type(value) is kind


def _has_member(value: dict[str, Any], name: str, kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        kind, added = get_args(kind)
        assert isinstance(added, Added), name
        value.setdefault(name, copy.deepcopy(added.value))
    return name in value and has_shape(value[name], kind)


@functools.cache
def _read_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _parse(response: http.client.HTTPResponse, content: bytes, media: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        if response.headers.get_content_type() == media:
            return json.loads(content)
    return None


def _wrong(response: http.client.HTTPResponse) -> OrchestratorError:
    # The reason phrase is omitted: it can contain control characters.
    return OrchestratorError(f"unexpected response (HTTP {response.status}): not a NoHype manager", "check the address")


def _wrong_stream() -> OrchestratorError:
    return OrchestratorError("unexpected response (not a stream of events): not a NoHype manager", "check the address")
