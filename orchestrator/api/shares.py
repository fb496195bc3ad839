"""Counts the connections of a listener per user or address, and chooses which one to close when there are too many. Pure."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_HELD = 16 << 20
"""Maximum bytes of unread responses of one user or address; of all together, 4 times as many."""


SETTLED_SECONDS = 2.0
"""Seconds for which an idle connection is not closed in favour of a user or address that holds several. Otherwise a client that
reopens its connections as they are closed would be admitted each time, which costs more than a refusal."""
_REMEMBERED = 1024


def _never_busy() -> bool:
    return False


@dataclass(eq=False)
class Place:
    """A connection, from accept(2) on.

    Attributes:
        key: its user or address.
        busy: whether a complete request is being answered. Such a connection is never closed in favour of another.
        since: when it was accepted or last answered (time.monotonic()). Received bytes do not count: a client that sends one now
            and then would never be the oldest.
        held: bytes of its response that are not sent yet.
    """

    key: str
    close: Callable[[], object]
    busy: Callable[[], bool] = _never_busy
    since: float = field(default_factory=time.monotonic)
    held: int = 0


class Shares:
    """The connections of one listener. For one thread.

    For a new connection the oldest idle one of the user or address with the most connections is closed; it is refused only if
    there is none. So idle connections never keep other users out.

    Args:
        each: connections of one user or address.
        most: connections of all.
        spare: additional connections for users and addresses with fewer than ``few``, while all others are busy.
    """

    def __init__(self, each: int, most: int, spare: int = 64, few: int = 4) -> None:
        self._each, self._most, self._spare, self._few = each, most, spare, few
        self._holders: dict[str, set[Place]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._holders.values()))

    def admit(self, place: Place, *, always: bool = False) -> bool:
        """Counts a new connection and may close another; returns whether it is admitted.

        Args:
            always: admit it even if all others are busy (root's, up to twice the maximum).
        """
        count, total = len(self._holders.get(place.key, ())), len(self)
        if count >= self._each:
            room = self._close_idle([place.key], before=place.since - SETTLED_SECONDS) or (
                always and total < 2 * self._most and all(other.busy() for other in self._holders[place.key])
            )
        elif total >= self._most:
            greater = [key for key, held in self._holders.items() if len(held) > count or key == place.key]
            before = math.inf if count < self._few else place.since - SETTLED_SECONDS
            room = self._close_idle(sorted(greater, key=lambda key: -len(self._holders[key])), before)
            room = room or (always and total < 2 * self._most) or (count < self._few and total < self._most + self._spare)
        else:
            room = True
        if room:
            self._holders.setdefault(place.key, set()).add(place)
        return room

    def make_room(self) -> bool:
        """Closes the oldest idle connection of the user or address with the most; for a process without free descriptors."""
        return self._close_idle(sorted(self._holders, key=lambda key: -len(self._holders[key])))

    def release(self, place: Place) -> None:
        """Removes a connection that has ended. Idempotent."""
        held = self._holders.get(place.key, set())
        held.discard(place)
        place.held = 0
        if not held:
            self._holders.pop(place.key, None)

    def hold(self, place: Place, size: int) -> None:
        """Records unread bytes of a response. Above the maximum, closes the connections whose responses have waited longest."""
        place.held = size
        self._bound([place.key], MAX_HELD, place)
        self._bound(list(self._holders), 4 * MAX_HELD, place)

    def _bound(self, keys: list[str], most: int, but: Place) -> None:
        holding = [place for key in keys for place in self._holders.get(key, ()) if place.held]
        total = sum(place.held for place in holding)
        for place in sorted(holding, key=lambda place: (place is but, place.since)):
            if total <= most or place is but:
                return
            total -= place.held
            self._end(place)

    def _close_idle(self, keys: list[str], before: float = math.inf) -> bool:
        for key in keys:
            idle = [place for place in self._holders[key] if place.since <= before and not place.busy()]
            if idle:
                # Prefer one that has nothing left to send.
                self._end(min(idle, key=lambda place: (place.held > 0, place.since)))
                return True
        return False

    def _end(self, place: Place) -> None:
        self.release(place)
        place.close()


class Pace:
    """Rate of an expensive operation per user or address (generic cell rate algorithm, ITU-T I.371).

    Args:
        rate: per second, sustained.
        burst: without a delay, after a pause.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._step, self._burst, self._clock = 1 / rate, burst, clock
        self._due: OrderedDict[str, float] = OrderedDict()

    def reserve(self, key: str) -> float:
        """Reserves the next slot; returns the seconds until it."""
        now = self._clock()
        due = max(self._due.get(key, 0.0), now) + self._step
        self._due[key] = due
        self._due.move_to_end(key)
        while len(self._due) > _REMEMBERED:
            self._due.popitem(last=False)
        return max(0.0, due - self._burst * self._step - now)
