"""Canonical JSON (RFC 8785): equal values have equal bytes, which can be hashed and signed. Numbers are those of I-JSON."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

MAX_DEPTH = 64
"""Levels of arrays and objects."""

_SAFE = (1 << 53) - 1
"""Larger integers are not exact in a double (RFC 7493 2.2)."""

_quote = json.JSONEncoder(ensure_ascii=False).encode


def canonicalize(value: object) -> bytes:
    """Raises ValueError for what has no canonical form: NaN, an integer that is not exact in a double, a lone surrogate, a key
    that is not text, another type, or more than ``MAX_DEPTH`` levels.
    """
    parts: list[str] = []
    _write(value, parts, 0)
    return "".join(parts).encode()


def parse_canonical(data: bytes) -> Any:
    """The value of canonical JSON. Raises ValueError if the bytes are not exactly those that `canonicalize` returns for it."""
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_build_object, parse_constant=_refuse_constant, parse_int=_parse_integer
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at byte {error.pos}: {error.msg[:1].lower()}{error.msg[1:]}") from None
    if canonicalize(value) != data:
        raise ValueError("JSON that is not in the canonical form of RFC 8785")
    return value


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"an object with the key {twice!r:.80} twice")
    return found


def _parse_integer(text: str) -> int | float:
    """A large float is written without exponent."""
    return int(text) if len(text) <= len(str(_SAFE)) and abs(int(text)) <= _SAFE else float(text)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text}, which is not a JSON number")


def _write(value: object, parts: list[str], depth: int) -> None:
    if value is None or isinstance(value, bool):
        parts.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, str):
        parts.append(_quote(value))
    elif isinstance(value, int):
        parts.append(_format_integer(value))
    elif isinstance(value, float):
        parts.append(_format_number(value))
    elif depth >= MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    elif isinstance(value, dict):
        _write_object(value, parts, depth + 1)
    elif isinstance(value, list | tuple):
        parts.append("[")
        for index, item in enumerate(value):
            parts.append("," if index else "")
            _write(item, parts, depth + 1)
        parts.append("]")
    else:
        raise ValueError(f"a value of type {type(value).__name__}, which has no JSON form")


def _write_object(value: dict[Any, object], parts: list[str], depth: int) -> None:
    if not all(isinstance(key, str) for key in value):
        raise ValueError("an object with a key that is not text")
    parts.append("{")
    # RFC 8785 3.2.3: by UTF-16 code units. A lone surrogate is refused when the text is encoded.
    for index, key in enumerate(sorted(value, key=lambda text: text.encode("utf-16-be", "surrogatepass"))):
        parts.append(f"{',' if index else ''}{_quote(key)}:")
        _write(value[key], parts, depth)
    parts.append("}")


def _format_integer(value: int) -> str:
    if abs(value) > _SAFE:
        # A large float is written without exponent, and json.loads() makes an integer of it.
        text = str(value) if abs(value) < 10**21 else ""
        if text != _format_number(float(value) if text else 0.0):
            raise ValueError(f"the integer {text or 'of more than 21 digits'}, which is not exact in a double")
        return text
    return str(value)


def _format_number(value: float) -> str:
    """ECMAScript's Number::toString (ECMA-262 6.1.6.1.20), as RFC 8785 3.2.2.3 demands."""
    if not math.isfinite(value):
        raise ValueError(f"the number {value}, which has no JSON form")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    # repr() has the fewest digits that identify the number, as ECMAScript has.
    _, numbers, exponent = Decimal(repr(abs(value))).as_tuple()
    digits = "".join(map(str, numbers)).rstrip("0")
    point = len(numbers) + int(exponent)  # digits before the decimal point
    if len(digits) <= point <= 21:
        return f"{sign}{digits}{'0' * (point - len(digits))}"
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{fraction}e{'+' if point > 0 else '-'}{abs(point - 1)}"
