"""Compares two files of evidence: host, software, guests, proofs and what each proof has read. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Difference = tuple[str, str, str]
"""Place, value in the first file, value in the second; "-" for what one of them does not have."""

_ABSENT = "-"
# They differ between any two audits.
_ALWAYS = ("created", "nonce")
# What differs between any two audits of a host that works: what proofs read, and the growing event log.
_VALUES = ("figure", "evidence", "readings", "values")
_GROWING = ("events", "first", "last", "hash", "removed")
_ALWAYS_OF_TPM = ("quoted", "signature")


def compare(first: Mapping[str, Any], second: Mapping[str, Any], *, values: bool = True) -> tuple[Difference, ...]:
    """In the order: the host and its software, the event log, guests, proofs. ``values``: also what proofs have read, and the
    length of the event log.
    """
    if not values:
        first, second = _leave_out_values(first), _leave_out_values(second)
    found: list[Difference] = []
    for part in sorted(first.keys() | second.keys()):
        if part not in (*_ALWAYS, "guests", "proofs"):
            found += _compare_values(part, _leave_out(part, first), _leave_out(part, second))
    found += _compare_named("guest", _index(first, "guests", "name"), _index(second, "guests", "name"))
    found += _compare_named("proof", _index(first, "proofs", "name", "subject"), _index(second, "proofs", "name", "subject"))
    return tuple(found)


def _leave_out_values(evidence: Mapping[str, Any]) -> dict[str, Any]:
    def drop(item: object, names: tuple[str, ...]) -> object:
        return {name: value for name, value in item.items() if name not in names} if isinstance(item, dict) else item

    proofs = [drop(proof, _VALUES) for proof in evidence.get("proofs") or ()]
    return {**evidence, "proofs": proofs, "events": drop(evidence.get("events"), _GROWING)}


def _leave_out(part: str, evidence: Mapping[str, Any]) -> object:
    """A part without what differs between any two audits."""
    value = evidence.get(part)
    if part != "host" or not isinstance(value, dict) or not isinstance(value.get("tpm"), dict):
        return value
    return {**value, "tpm": {name: item for name, item in value["tpm"].items() if name not in _ALWAYS_OF_TPM}}


def _index(evidence: Mapping[str, Any], part: str, *keys: str) -> dict[str, Any]:
    return {" ".join(str(item.get(key)) for key in keys): item for item in evidence.get(part) or () if isinstance(item, dict)}


def _compare_named(kind: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in second:
            yield f"{kind} {name}", "present", _ABSENT
        elif name not in first:
            yield f"{kind} {name}", _ABSENT, "present"
        else:
            yield from _compare_values(f"{kind} {name}", first[name], second[name])


def _compare_values(place: str, first: object, second: object) -> Iterator[Difference]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in [*first, *(name for name in second if name not in first)]:
            if name != "evidence":
                yield from _compare_values(f"{place} {name}", first.get(name, _ABSENT), second.get(name, _ABSENT))
        yield from _compare_lines(place, first.get("evidence"), second.get("evidence"))
    elif first != second or isinstance(first, bool) != isinstance(second, bool):
        yield place, _show(first), _show(second)


def _compare_lines(place: str, first: object, second: object) -> Iterator[Difference]:
    """Lines of evidence, which are sentences: those that only one of both has."""
    # As sets: a file may have a million lines.
    old, new = (dict.fromkeys(map(_show, value)) if isinstance(value, list) else {} for value in (first, second))
    for line in old:
        if line not in new:
            yield f"{place} evidence", line, _ABSENT
    for line in new:
        if line not in old:
            yield f"{place} evidence", _ABSENT, line


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
