"""Frozen values as plain JSON types, for the HTTP interface, reports and stored records."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from orchestrator.errors import RequestError
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

_T = TypeVar("_T")
_SCALARS = {bool, int, float, str}
_AS_TEXT = (CpuSet, PciAddress, MacAddress, UUID, PurePath)


def to_plain(value: object) -> Any:
    """Dataclasses become objects, CPU sets and addresses text in the kernel's format, sizes bytes.

    Raises TypeError for a value of another type.
    """
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, Size):
        return value.bytes
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(to_plain(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no plain JSON form")


def from_plain(kind: type[_T], data: object) -> _T:
    """Reads what ``to_plain`` returned for this type. Nothing is converted silently.

    A size is bytes, or text such as "2M". Fields with a default may be absent.

    Raises:
        ValueError: with the path of the wrong field.
        TypeError: the type has no plain JSON form.
    """
    value: _T = _read(kind, data, "")
    return value


def _read(kind: Any, data: object, path: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return _read_optional(kind, data, path)
    if get_origin(kind) is tuple:
        item, *more = get_args(kind)
        if more != [...]:
            raise TypeError(f"{kind} has no plain JSON form")
        if not isinstance(data, list):
            raise ValueError(f"{path}: not a list")
        return tuple(_read(item, part, f"{path}.{index}") for index, part in enumerate(data))
    if get_origin(kind) is dict:
        return _read_items(kind, data, path)
    if dataclasses.is_dataclass(kind) and kind not in (*_AS_TEXT, Size):
        return _read_fields(kind, data, path)
    if kind is float and type(data) is int:
        return data  # JSON has one kind of number
    if kind in _SCALARS:
        if type(data) is not kind:
            raise ValueError(f"{path}: not of type {kind.__name__}")
        return data
    return _parse(kind, data, path)


def _read_optional(kind: Any, data: object, path: str) -> Any:
    inner = [part for part in get_args(kind) if part is not types.NoneType]
    if data is not None and set(inner) <= _SCALARS and len(inner) > 1:
        if type(data) not in inner:
            raise ValueError(f"{path}: not of type {' or '.join(part.__name__ for part in inner)}")
        return data
    if len(inner) != 1:
        raise TypeError(f"{kind} has no plain JSON form")
    return None if data is None else _read(inner[0], data, path)


def _read_items(kind: Any, data: object, path: str) -> Any:
    key, item = get_args(kind)
    if key is not str:
        raise TypeError(f"{kind} has no plain JSON form")
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not an object")
    return {name: _read(item, value, f"{path}.{name}") for name, value in data.items()}


def _read_fields(kind: Any, data: object, path: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{path or kind.__name__}: not an object")
    hints, start = get_type_hints(kind), f"{path}." if path else ""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in data.keys() - fields.keys():
        raise ValueError(f"{start}{name}: unknown field")
    for name, field in fields.items():
        if name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{start}{name}: missing")
    return kind(**{name: _read(hints[name], value, f"{start}{name}") for name, value in data.items()})


def _parse(kind: Any, data: object, path: str) -> Any:
    """A value that is written as text, an enumeration, or a size."""
    try:
        if kind is Size and type(data) is int:
            return Size(data)
        if issubclass(kind, Enum):
            return kind(data)
        if not isinstance(data, str):
            raise ValueError("not text")
        if kind in (CpuSet, PciAddress, MacAddress, Size):
            return kind.parse(data)
        if kind in _AS_TEXT:
            return kind(data)
    except RequestError as error:
        raise ValueError(f"{path}: {error.message}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    raise TypeError(f"{kind.__name__} has no plain JSON form")
