"""Polling with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_until(read: Callable[[], Value], accept: Callable[[Value], object] = bool, *, timeout: float, interval: float) -> Value:
    """Calls ``read`` every ``interval`` seconds until its value is accepted, for at most ``timeout`` seconds.

    Returns:
        The last value: the accepted one, or after the time-out one that is not. ``read`` is called at least once.
    """
    deadline = time.monotonic() + timeout
    while not accept(value := read()) and time.monotonic() < deadline:
        time.sleep(interval)
    return value
