"""Who holds how many connections of a listener, and which connection gives way when there are too many. No sockets here."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_HELD = 16 << 20
"""Bytes of answers that one user or address has asked for and not read yet; and all together, 4 times as many."""


SETTLED_SECONDS = 2.0
"""Seconds for which an idle connection is kept although a user or address that holds several wants its place. A client that
reopens all connections as they are closed would otherwise be admitted each time, which costs more than a refusal."""
_REMEMBERED = 1024


def _never_busy() -> bool:
    return False


@dataclass(eq=False)
class Place:
    """A connection, from the moment at which it is accepted.

    Attributes:
        key: whose it is: a user, or an address.
        close: ends it immediately.
        busy: whether a whole request has arrived and is not answered yet. Such a connection never gives way.
        since: when it was accepted or last answered (time.monotonic()). What it sends does not count: who sends a byte now and
            then would else never be the oldest.
        held: bytes of its answer that are not sent yet.
    """

    key: str
    close: Callable[[], object]
    busy: Callable[[], bool] = _never_busy
    since: float = field(default_factory=time.monotonic)
    held: int = 0


class Shares:
    """The connections of one listener. For one thread.

    A new connection is refused only if no other may give way: the oldest idle one of whoever holds the most is closed instead.
    So however many connections some hold open without using them, others always get in.

    Args:
        each: connections of one user or address.
        most: connections of all.
        spare: how many more there may be for users and addresses that hold fewer than ``few``, while all others are busy.
    """

    def __init__(self, each: int, most: int, spare: int = 64, few: int = 4) -> None:
        self._each, self._most, self._spare, self._few = each, most, spare, few
        self._holders: dict[str, set[Place]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._holders.values()))

    def admit(self, place: Place, *, always: bool = False) -> bool:
        """Counts a new connection; may close another for it.

        Args:
            always: let it in even if all others are busy (root's, up to twice as many as there may be).

        Returns:
            Whether there is a place for it.
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
        """Closes the oldest idle connection of the greatest holder, if there is one: the process has no descriptor left."""
        return self._close_idle(sorted(self._holders, key=lambda key: -len(self._holders[key])))

    def release(self, place: Place) -> None:
        """The connection has ended. One that was released before may be released again."""
        held = self._holders.get(place.key, set())
        held.discard(place)
        place.held = 0
        if not held:
            self._holders.pop(place.key, None)

    def hold(self, place: Place, size: int) -> None:
        """So many bytes of an answer wait to be read. Closes connections whose answers have waited longest if it is too much."""
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
                # One that has nothing left to send before one whose answer would be cut off.
                self._end(min(idle, key=lambda place: (place.held > 0, place.since)))
                return True
        return False

    def _end(self, place: Place) -> None:
        self.release(place)
        place.close()


class Pace:
    """How soon each user or address may begin something that costs much (the generic cell rate algorithm, ITU-T I.371).

    Args:
        rate: per second, sustained.
        burst: without a delay, after a pause.
        clock: seconds that only grow.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._step, self._burst, self._clock = 1 / rate, burst, clock
        self._due: OrderedDict[str, float] = OrderedDict()

    def reserve(self, key: str) -> float:
        """Takes a turn; returns in how many seconds it is."""
        now = self._clock()
        due = max(self._due.get(key, 0.0), now) + self._step
        self._due[key] = due
        self._due.move_to_end(key)
        while len(self._due) > _REMEMBERED:
            self._due.popitem(last=False)
        return max(0.0, due - self._burst * self._step - now)
