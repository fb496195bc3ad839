"""Counts the connections of a listener per user or address, and chooses which one to close when there are too many. Pure."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

# Maximum bytes of unread responses of one user or address; of all together, 4 times as many.
MAX_HELD = 16 << 20
# An idle connection is not closed for this long in favour of a user or address that holds several. Otherwise a client that
# reopens its connections as they are closed would be admitted each time, which costs more than a refusal.
SETTLED_SECONDS = 2.0
_REMEMBERED = 1024


def _never_busy() -> bool:
    return False


@dataclass(eq=False)
class Place:
    """A connection, from accept(2) on."""

    key: str  # user or address
    close: Callable[[], object]
    busy: Callable[[], bool] = _never_busy  # whether a complete request is being answered: then it is never closed for another
    # When it was accepted or last answered. Received bytes do not count: a client that sends a few would never be the oldest.
    since: float = field(default_factory=time.monotonic)
    held: int = 0  # bytes of its response that are not sent yet


class Shares:
    """The connections of one listener. Not thread-safe.

    When the maximum is reached, a new connection replaces the oldest idle one of the user or address with the most connections;
    without an idle one it is refused. So idle connections never keep other users out.

    Args:
        each: maximum of one user or address.
        most: maximum of all together.
        spare: additional connections for users and addresses with fewer than ``few``, while all others are busy.
    """

    def __init__(self, each: int, most: int, spare: int = 64, few: int = 4) -> None:
        self._each, self._most, self._spare, self._few = each, most, spare, few
        self._holders: dict[str, set[Place]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._holders.values()))

    def admit(self, place: Place, *, always: bool = False) -> bool:
        """Counts a new connection and may close another; returns whether the new one is admitted.

        ``always`` admits it even if all others are busy, up to twice the maximum; for root.
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
        """Closes an idle connection when the process has no free descriptors; returns whether there was one."""
        return self._close_idle(sorted(self._holders, key=lambda key: -len(self._holders[key])))

    def release(self, place: Place) -> None:
        """Idempotent."""
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
                # First the connections that have nothing left to send, then the oldest.
                self._end(min(idle, key=lambda place: (place.held > 0, place.since)))
                return True
        return False

    def _end(self, place: Place) -> None:
        self.release(place)
        place.close()


class Pace:
    """Limits the rate of an operation per user or address (generic cell rate algorithm, ITU-T I.371).

    Args:
        rate: operations per second, sustained.
        burst: operations without a delay, after a pause.
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
