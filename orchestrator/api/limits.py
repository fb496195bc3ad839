"""Limits per client: a token bucket, and the number of requests in progress."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.errors import TooMany
from orchestrator.model.access import Identity

MAX_CLIENTS = 1024
_SOON, _ENDLESS = 1.0, 3600.0


class Kind(StrEnum):
    """Each kind of request has its own limit of requests in progress."""

    WAIT = "wait"  # changes nothing, and takes as long as the client chooses
    END = "end"  # forces a guest off; counted separately, so that a client at its other limits can still do it
    OTHER = "other"


class Admission:
    """A request in progress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: float | None = None

    def may_last(self, seconds: float) -> None:
        """Records that the request can take this long from now."""
        self._until = self._clock() + seconds

    @property
    def left(self) -> float | None:
        """Seconds until the request is due; None if unknown."""
        return None if self._until is None else max(_SOON, self._until - self._clock())


@dataclass
class _Account:
    tokens: float
    time: float
    running: dict[Kind, list[Admission]] = field(default_factory=lambda: {kind: [] for kind in Kind})


class RateLimiter:
    """Counts the requests of each client. For one thread.

    Args:
        rate: requests per second, sustained.
        burst: requests at the same time after a pause.
        concurrent: requests in progress, of each kind.
    """

    def __init__(self, rate: float, burst: int, concurrent: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._concurrent, self._clock = rate, burst, concurrent, clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def consume(self, client: str) -> None:
        """Takes one token. Raises TooMany if there is none, with the seconds until the next one."""
        account = self._account(client)
        now = self._clock()
        account.tokens = min(self._burst, account.tokens + (now - account.time) * self._rate)
        account.time = now
        if account.tokens < 1:
            wait = round((1 - account.tokens) / self._rate, 3)
            text = f"rate limit exceeded for {client}: {self._rate:g}/s, burst {self._burst}"
            raise TooMany(text, f"retry after {math.ceil(wait)} s", wait)
        account.tokens -= 1

    @contextmanager
    def admit(self, client: str, kind: Kind = Kind.OTHER) -> Iterator[Admission]:
        """Counts a request as running while the block runs.

        Raises TooMany as ``consume`` does, or if too many requests of its kind are in progress: with the seconds until the first
        is due, or 1 s if that is not known for all of them.
        """
        self.consume(client)
        running = self._account(client).running[kind]
        if len(running) >= self._concurrent:
            raise _explain(client, kind, running)
        admission = Admission(self._clock)
        running.append(admission)
        try:
            yield admission
        finally:
            running.remove(admission)

    def count(self, client: str, kind: Kind) -> int:
        """The number of requests in progress."""
        account = self._accounts.get(client)
        return len(account.running[kind]) if account else 0

    def __len__(self) -> int:
        return len(self._accounts)

    def _account(self, client: str) -> _Account:
        if client not in self._accounts:
            self._accounts[client] = _Account(self._burst, self._clock())
            self._forget()
        self._accounts.move_to_end(client)
        return self._accounts[client]

    def _forget(self) -> None:
        """Evicts the least recently seen idle clients; unauthenticated addresses are unbounded."""
        idle = (client for client, account in self._accounts.items() if not any(account.running.values()))
        while len(self._accounts) > MAX_CLIENTS and (oldest := next(idle, None)):
            del self._accounts[oldest]
            idle = (client for client, account in self._accounts.items() if not any(account.running.values()))


def name_client(caller: Identity) -> str:
    """All callers of a tenant are one client."""
    return f"tenant {caller.tenant}" if caller.tenant else caller.name


def _explain(client: str, kind: Kind, running: list[Admission]) -> TooMany:
    known = [left for admission in running if (left := admission.left) is not None]
    first = min(known) if len(known) == len(running) else None
    if first is None:
        wait, when = _SOON, ""
    elif math.isinf(first):
        wait, when = _ENDLESS, "; none of them ends before the client closes it"
    else:
        wait, when = round(first, 3), f"; the first is due in {math.ceil(first)} s"
    hint = {
        Kind.WAIT: "close the connection of a waiting request",
        Kind.END: "wait for one to finish",
        Kind.OTHER: "wait for one to finish; kill and delete are accepted meanwhile",
    }
    what = "waiting requests" if kind is Kind.WAIT else "requests in progress"
    return TooMany(f"{client} has {len(running)} {what}, the limit{when}", hint[kind], wait)
