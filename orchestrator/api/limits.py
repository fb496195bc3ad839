"""How much one client may ask for: a token bucket and a number of requests at a time for each."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from orchestrator.errors import TooMany

_REMEMBERED = 1024


@dataclass
class _Account:
    tokens: float
    time: float
    running: int = 0


class Turns:
    """Counts the requests of each client. For one thread.

    Args:
        rate: requests a second that a client may send for ever.
        burst: how many it may send at once after a pause.
        concurrent: how many of them may be worked on at a time.
        clock: seconds, never going backwards.
    """

    def __init__(self, rate: float, burst: int, concurrent: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._concurrent, self._clock = rate, burst, concurrent, clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def charge(self, client: str) -> None:
        """Takes one token.

        Raises:
            TooMany: there is none; with the seconds until there is.
        """
        account = self._account(client)
        now = self._clock()
        account.tokens = min(self._burst, account.tokens + (now - account.time) * self._rate)
        account.time = now
        if account.tokens < 1:
            wait = round((1 - account.tokens) / self._rate, 3)
            text = f"more than {self._rate:g} requests a second, and {self._burst} at once, come from {client}"
            raise TooMany(text, f"wait {math.ceil(wait)} s", wait)
        account.tokens -= 1

    @contextmanager
    def turn(self, client: str) -> Iterator[None]:
        """Counts a request as running while the block runs.

        Raises:
            TooMany: as ``charge``, or too many are running.
        """
        self.charge(client)
        account = self._account(client)
        if account.running >= self._concurrent:
            raise TooMany(f"{account.running} requests of {client} are running already", "wait for the answers of some")
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    def _account(self, client: str) -> _Account:
        if client not in self._accounts:
            self._accounts[client] = _Account(self._burst, self._clock())
            self._forget()
        self._accounts.move_to_end(client)
        return self._accounts[client]

    def _forget(self) -> None:
        """Addresses of strangers are without number: those are forgotten that were not seen for longest."""
        idle = (client for client, account in self._accounts.items() if not account.running)
        while len(self._accounts) > _REMEMBERED and (oldest := next(idle, None)):
            del self._accounts[oldest]
            idle = (client for client, account in self._accounts.items() if not account.running)
