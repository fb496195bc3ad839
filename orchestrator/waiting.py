"""Polling with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_until(read: Callable[[], Value], accept: Callable[[Value], object] = bool, *, timeout: float, interval: float) -> Value:
    """Calls ``read``, at least once, until ``accept`` accepts its value or ``timeout`` seconds passed. Returns the last value."""
    deadline = time.monotonic() + timeout
    while not accept(value := read()) and time.monotonic() < deadline:
        time.sleep(interval)
    return value
