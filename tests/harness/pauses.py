"""Pauses that a test records instead of waiting for them."""

import threading
import time

import pytest

__all__ = ["record_pauses"]


def record_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses in seconds that this thread asks for from now on; it does not wait.

    Other threads of the process wait as usual: libvirt's event loop, for example, which an earlier test started.
    """
    paused: list[float] = []
    caller, sleep = threading.get_ident(), time.sleep

    def pause(seconds: float) -> None:
        if threading.get_ident() == caller:
            paused.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", pause)
    return paused
