"""Polling: what is returned, and when it stops."""

from __future__ import annotations

import time

from orchestrator.waiting import wait_until


def test_accepted_value_is_returned_and_polling_stops() -> None:
    values = iter(range(9))
    assert wait_until(lambda: next(values), lambda value: value == 3, timeout=5, interval=0) == 3
    assert next(values) == 4


def test_timeout_returns_the_last_value() -> None:
    values = iter(range(10_000))
    started = time.monotonic()
    last = wait_until(lambda: next(values), lambda _: False, timeout=0.1, interval=0.01)
    assert last >= 1
    assert last + 1 == next(values)
    assert 0.1 <= time.monotonic() - started < 2


def test_value_is_read_once_without_time() -> None:
    values = iter(range(9))
    assert wait_until(lambda: next(values), timeout=0, interval=1) == 0
    assert next(values) == 1
