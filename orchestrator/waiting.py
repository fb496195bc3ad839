"""Polling and repeating with a deadline."""

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


def retry(call: Callable[[], Value], errors: tuple[type[Exception], ...], *, timeout: float, interval: float) -> Value:
    """Returns what ``call`` returns. Repeats it for ``timeout`` seconds while it raises one of ``errors``, then raises the last.

    An error with an attribute ``wait``, in seconds, prolongs the interval before the next call.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return call()
        except errors as error:
            if time.monotonic() > deadline:
                raise
            time.sleep(max(interval, getattr(error, "wait", 0.0)))
