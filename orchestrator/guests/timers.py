"""Timers that can be taken back, also at the last moment."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Timers:
    """At most one timer for each name. Whoever calls a method that takes a name holds that name's lock."""

    def __init__(self) -> None:
        self._timers: dict[str, threading.Timer] = {}

    def set(self, name: str, seconds: float, work: Callable[[threading.Timer], object]) -> None:
        """Calls ``work`` after so many seconds, in a thread of its own, in place of what was to be called before."""
        self.cancel(name)
        timer = threading.Timer(seconds, lambda: work(timer))
        timer.daemon = True
        self._timers[name] = timer
        timer.start()

    def take(self, name: str, timer: threading.Timer) -> bool:
        """Whether this timer has not been taken back while its ``work`` waited for the lock; it is gone then."""
        if self._timers.get(name) is not timer:
            return False
        del self._timers[name]
        return True

    def cancel(self, name: str) -> None:
        """Takes the timer of this name back, if there is one."""
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def get(self, name: str) -> threading.Timer | None:
        """The timer that waits."""
        return self._timers.get(name)

    def close(self) -> None:
        """Cancels all."""
        for timer in list(self._timers.values()):
            timer.cancel()
