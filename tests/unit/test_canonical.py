"""Canonical JSON: the vectors of RFC 8785, and properties for all values."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.canonical import MAX_DEPTH, canonicalize, parse_canonical

# RFC 8785, appendix B: IEEE 754 bits and their ECMAScript form.
NUMBERS = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555554": "333333333.33333325",
    "41b3de4355555555": "333333333.3333333",
    "41b3de4355555556": "333333333.3333334",
    "41b3de4355555557": "333333333.33333343",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}


@pytest.mark.parametrize(("bits", "text"), NUMBERS.items())
def test_numbers_of_the_rfc(bits: str, text: str) -> None:
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonicalize(number) == text.encode()


def test_example_of_the_rfc() -> None:
    """RFC 8785 3.2.2 to 3.2.4."""
    text = (
        r'{"numbers":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001],'
        r'"string":"\u20ac$\u000F\u000aA\u0027\u0042\u0022\u005c\\\"\/","literals":[null,true,false]}'
    )
    wanted = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert canonicalize(json.loads(text)) == wanted.encode()


def test_order_of_keys_of_the_rfc() -> None:
    """RFC 8785 3.2.3: by UTF-16 code units, where a surrogate pair sorts before U+FB33."""
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\x80", "ö"]
    ordered = list(json.loads(canonicalize(dict.fromkeys(keys, 0))))
    assert ordered == ["\r", "1", "\x80", "ö", "\u20ac", "\U0001f600", "\ufb33"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
)  # fmt: skip


@given(VALUES)
def test_canonical_json_is_read_back_equal_and_canonical(value: Any) -> None:
    data = canonicalize(value)
    found = parse_canonical(data)
    assert found == value
    assert canonicalize(found) == data


@given(VALUES)
def test_other_spellings_of_a_value_are_canonicalized_alike_and_refused(value: Any) -> None:
    other = json.dumps(value, indent=1, ensure_ascii=True).encode()
    assert canonicalize(json.loads(other)) == canonicalize(value)
    if other != canonicalize(value):
        with pytest.raises(ValueError, match="canonical form"):
            parse_canonical(other)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_number_keeps_its_value_in_the_fewest_digits(number: float) -> None:
    text = canonicalize(number).decode()
    assert float(text) == number
    assert len([sign for sign in text.partition("e")[0] if sign.isdigit()]) <= 21 + 6


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "the number nan"),
        (math.inf, "the number inf"),
        (2**53, None),
        (2**53 + 1, "9007199254740993, which is not exact"),
        (2**60, "which is not exact in a double"),
        (10**50, "more than 21 digits"),
        ({1: 2}, "a key that is not text"),
        ({"a"}, "type set"),
        (b"a", "type bytes"),
        ("\ud800", "surrogates not allowed"),
        ({"\ud800": 1}, "surrogates not allowed"),
    ],
)
def test_value_without_a_canonical_form_is_refused(value: object, reason: str | None) -> None:
    if reason is None:
        assert canonicalize(value) == str(value).encode()
        return
    with pytest.raises(ValueError, match=reason):
        canonicalize(value)


def nest(levels: int) -> object:
    value: object = 0
    for _ in range(levels):
        value = [value]
    return value


def test_depth_is_limited() -> None:
    assert parse_canonical(canonicalize(nest(MAX_DEPTH))) == nest(MAX_DEPTH)
    with pytest.raises(ValueError, match="nested more than"):
        canonicalize(nest(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON at byte 0"),
        (b'{"a":1,"a":1}', "the key 'a' twice"),
        (b'{"b":{"a":1,"a":2}}', "the key 'a' twice"),
        (b"NaN", "NaN, which is not a JSON number"),
        (b"[-Infinity]", "-Infinity, which is not"),
        (b"1e999", "the number inf"),
        (b"-0", "canonical form"),
        (b"1.0", "canonical form"),
        (b" 1", "canonical form"),
        (b"1\n", "canonical form"),
        (b'{"b":1,"a":1}', "canonical form"),
        (b'"\\u0041"', "canonical form"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"\xef\xbb\xbf1", "not JSON"),
        (b'{"a":', "not JSON at byte 5"),
        (b"[" * 100_000, "nested more than"),
        (b"[" * 100 + b"]" * 100, "nested more than"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested more than"),
        (b"9" * 10_000, "the number inf"),
        (b"9007199254740993", "canonical form"),
    ],
)
def test_hostile_json_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_canonical(data)


def test_key_twice_among_many_is_found_at_once() -> None:
    """Comparing each key with each other one takes hours."""
    names = [f'"{number:07d}":0' for number in range(200_000)]
    with pytest.raises(ValueError, match="the key '0199999' twice"):
        parse_canonical(f"{{{','.join([*names, names[-1]])}}}".encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        value = parse_canonical(data)
    except ValueError:
        return
    assert canonicalize(value) == data


@given(VALUES)
def test_agrees_with_the_package_rfc8785(value: Any) -> None:
    rfc8785 = pytest.importorskip("rfc8785")
    assert rfc8785.dumps(value) == canonicalize(value)
