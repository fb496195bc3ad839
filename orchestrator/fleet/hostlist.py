"""Ranges of names in Slurm's configuration, such as host[1-3,07-09], which stand for several lines (slurm.conf(5), NodeName)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import product

from orchestrator.errors import RequestError

MAX_NAMES = 65_536
"""Of one list; as many nodes as Slurm can have (MAX_SLURM_NODES)."""
_PART = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PIECE = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def expand(text: str) -> list[str]:
    """The names of a list, in its order. Raises RequestError if it is not one, or is longer than `MAX_NAMES`."""
    if "[" not in text and "]" not in text:
        return text.split(",")
    if re.sub(r"\[[0-9,-]+\]", "", text).count("[") or text.count("[") != text.count("]"):
        raise _error(text)
    names: list[str] = []
    for part in _PART.findall(text):
        pieces = [_list_numbers(numbers, text) if numbers else [fixed] for numbers, fixed in _PIECE.findall(part)]
        if len(names) + math.prod(map(len, pieces)) > MAX_NAMES:
            raise RequestError(f"{text!r} has more than {MAX_NAMES} names", "correct the range")
        names += ("".join(chosen) for chosen in product(*pieces))
    return names


def _list_numbers(text: str, whole: str) -> list[str]:
    """With the leading zeros of the first number of each range."""
    return [number for part in text.split(",") for number in _count(part, whole)]


def _count(part: str, whole: str) -> Iterator[str]:
    match = _RANGE.fullmatch(part)
    if not match or (match[2] and not 0 <= int(match[2]) - int(match[1]) < MAX_NAMES):
        raise _error(whole)
    yield from (f"{number:0{len(match[1])}}" for number in range(int(match[1]), int(match[2] or match[1]) + 1))


def _error(text: str) -> RequestError:
    return RequestError(f"{text!r} is not a list of names", "use the form host[1-3,07-09]")
