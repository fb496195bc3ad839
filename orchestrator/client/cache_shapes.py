"""Types of the responses about caches and memory bandwidth."""

from __future__ import annotations

from typing import Literal, TypedDict


class CacheShare(TypedDict):
    """The ways of the cache with this id that only the guest's cores fill, as a capacity bit mask."""

    id: int
    mask: int


class Caches(TypedDict):
    """A guest's part of the caches of a level, and its limit of memory bandwidth for each of the L3 caches ``throttled``.

    ``bandwidth`` is in ``unit`` (percent, MB/s or 1/8 GB/s); both are null without a limit. All is empty if the host cannot limit
    them, and the guest accepts that.
    """

    level: int
    shares: list[CacheShare]
    bandwidth: int | None
    unit: Literal["percent", "1/8 GB/s", "MB/s"] | None
    throttled: list[int]
