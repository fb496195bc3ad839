"""Guests of one group never run on the same host: each host has each slot once, and the guests of a group request the same slot.

Slurm allocates slots as it allocates VFs, so this also holds for guests that are queued at the same time, and after a restart of
the controller. `--exclude` of the hosts in use does not: two guests that wait can start together.

Each slot is a GRES of its own. As types of one GRES, Slurm compares each of them with each other for every node that it
considers: 1,000 guests on 1,000 hosts took twice as long to start (docs/fleet-measured.md).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from orchestrator.errors import RequestError
from orchestrator.values import NAME

_PREFIX = "apart"
SLOTS = 32
"""Groups are more than slots: two groups with the same slot avoid each other too."""
GRES_NAMES = tuple(f"{_PREFIX}{slot}" for slot in range(SLOTS))


def find_slot(group: str) -> int:
    """The slot of a group, by its name. Raises RequestError for an invalid name."""
    if not re.fullmatch(NAME, group, re.ASCII):
        raise RequestError(f"{group!r} is not the name of a group", "use 1 to 40 characters of a-z, 0-9 and inner hyphens")
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % SLOTS


def share_slots(number: int, count: int) -> tuple[int, ...]:
    """Those of one of ``count`` nodes of a host. Slurm counts per node, so each slot is on one node of the host only."""
    return tuple(range(number, SLOTS, count))


def build_gres(slots: Sequence[int]) -> list[str]:
    return [f"{_PREFIX}{slot}:1" for slot in slots]


def parse_slots(gres: str) -> tuple[int, ...]:
    return tuple(int(slot) for slot in re.findall(rf"(?:^|,){_PREFIX}(\d+):1", gres))
