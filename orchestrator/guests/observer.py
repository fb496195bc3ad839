"""What is counted where it happens, since no event tells of it, or not of each."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Is told by any thread; raises nothing."""

    def count_undo_failure(self) -> None:
        """What was changed for a guest, or for all, could not all be undone, or not be verified clean."""

    def observe_refusal(self, kind: str, seconds: float) -> None:
        """A request was answered with an event's ``kind`` ("refused", "plan-failed") that is not in the event log."""


class Unobserved:
    """Counts nothing."""

    def count_undo_failure(self) -> None:
        """See Observer."""

    def observe_refusal(self, kind: str, seconds: float) -> None:
        """See Observer."""
