"""The one serialiser of frozen values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from uuid import UUID

import pytest

from orchestrator.model.plain import to_plain
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size


class Colour(StrEnum):
    RED = "red"


class Number(Enum):
    ONE = 1


@dataclass(frozen=True)
class Inner:
    cpus: CpuSet
    size: Size | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    parts: tuple[Inner, ...]
    colour: Colour = Colour.RED


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (CpuSet.parse("0-3,8"), "0-3,8"),
        (Size.parse("2M"), 2 << 20),
        (PciAddress.parse("0000:01:10.3"), "0000:01:10.3"),
        (MacAddress.parse("02:4e:48:00:00:01"), "02:4e:48:00:00:01"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Path("/run/nohype"), "/run/nohype"),
        (Number.ONE, 1),
        ((1, 2.5, True, None, "x"), [1, 2.5, True, None, "x"]),
        ({Size.parse("1G"): (1, 2), Colour.RED: Number.ONE}, {str(1 << 30): [1, 2], "red": 1}),
        (
            Outer("a", (Inner(CpuSet.of([1])), Inner(CpuSet(), Size(5)))),
            {"name": "a", "parts": [{"cpus": "1", "size": None}, {"cpus": "", "size": 5}], "colour": "red"},
        ),
    ],
)
def test_value_becomes_plain_json_types(value: object, plain: object) -> None:
    assert to_plain(value) == plain
    assert json.loads(json.dumps(to_plain(value))) == plain


def test_string_enum_becomes_a_plain_string() -> None:
    assert type(to_plain(Colour.RED)) is str


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", (Inner(CpuSet()), object())])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="has no plain JSON form"):
        to_plain(value)
