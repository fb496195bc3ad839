"""Frozen values as plain JSON types: the one serialiser of the HTTP interface, of reports and of stored records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

_AS_TEXT = (CpuSet, PciAddress, MacAddress, UUID, PurePath)


def to_plain(value: object) -> Any:
    """The value as plain JSON types.

    Dataclasses become objects with all their fields. CPU sets and addresses become text in the kernel's format, sizes bytes.

    Raises:
        TypeError: the value, or a part of it, is of another type.
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
