"""Requests to the manager of a host, which can restart at any time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from orchestrator import waiting
from orchestrator.client import Client
from orchestrator.client.shapes import Guest
from orchestrator.client.transport import Unreachable
from orchestrator.errors import LostRace, NotFound, TooMany

_Value = TypeVar("_Value")
RETRY_SECONDS = 0.5
WIPING = "wiping"
"""State of a guest that has only its disks any more."""
MAY_PASS = (Unreachable, TooMany, LostRace)
"""Errors of a manager that restarts or is busy."""


def retry_manager(call: Callable[[], _Value], seconds: float) -> _Value:
    """Repeats a call for this long while the manager does not respond, or is busy."""
    return waiting.retry(call, MAY_PASS, timeout=seconds, interval=RETRY_SECONDS)


def find_guest(client: Client, name: str, guest_id: str) -> Guest | None:
    """None if no guest has the name, or if it is another guest. Raises OrchestratorError if the manager does not know."""
    try:
        guest = client.guest(name)
    except NotFound:
        return None
    return guest if guest["id"] == guest_id else None
