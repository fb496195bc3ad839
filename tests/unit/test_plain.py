"""The one serialiser of frozen values."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from pathlib import Path
from uuid import UUID

import pytest

from orchestrator.model.plain import from_plain, to_plain
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


@dataclass(frozen=True)
class Everything:
    cpus: CpuSet
    size: Size
    pci: PciAddress
    mac: MacAddress | None
    id: UUID
    colour: Colour
    number: Number
    inner: tuple[Inner, ...] = ()
    names: tuple[str, ...] = field(default=("a",))
    flag: bool = False
    rate: float | None = None
    counts: dict[str, int] = field(default_factory=dict)


EVERYTHING = Everything(
    CpuSet.parse("0-3,8"), Size.parse("2M"), PciAddress.parse("0000:01:10.3"), None, UUID(int=7), Colour.RED, Number.ONE,
    (Inner(CpuSet(), None), Inner(CpuSet.of([5]), Size(9))), (), flag=True, rate=2, counts={"nic0": 3},
)  # fmt: skip


def test_value_is_read_back() -> None:
    assert from_plain(Everything, json.loads(json.dumps(to_plain(EVERYTHING)))) == EVERYTHING


def test_absent_fields_get_their_defaults_and_sizes_may_be_text() -> None:
    fields = {**to_plain(EVERYTHING), "size": "2M"}
    for name in ("inner", "names", "flag", "rate", "counts"):
        del fields[name]
    assert from_plain(Everything, fields) == replace(EVERYTHING, inner=(), names=("a",), flag=False, rate=None, counts={})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cpus": "x"}, "cpus: 'x' is not a list of CPUs"),
        ({"cpus": 3}, "cpus: not text"),
        ({"size": True}, "size: not text"),
        ({"size": "much"}, "size: 'much' is not a size"),
        ({"pci": ""}, "pci: '' is not a PCI address"),
        ({"id": "7"}, "id: badly formed"),
        ({"colour": "blue"}, "colour: 'blue' is not a valid"),
        ({"flag": 1}, "flag: not of type bool"),
        ({"names": "a"}, "names: not a list"),
        ({"names": ["a", None]}, "names.1: not of type str"),
        ({"inner": [{}]}, "inner.0.cpus: missing"),
        ({"inner": [[]]}, "inner.0: not an object"),
        ({"inner": [{"cpus": "1", "more": 1}]}, "inner.0.more: unknown field"),
        ({"rate": True}, "rate: not of type float"),
        ({"counts": [1]}, "counts: not an object"),
        ({"counts": {"nic0": "3"}}, "counts.nic0: not of type int"),
        ({"more": 1}, "more: unknown field"),
    ],
)
def test_other_data_is_refused_with_the_path_of_the_field(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        from_plain(Everything, {**to_plain(EVERYTHING), **change})


def test_type_without_plain_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no plain JSON form"):
        from_plain(Unreadable, {"value": "x"})


@dataclass(frozen=True)
class Unreadable:
    value: bytes
