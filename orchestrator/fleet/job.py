"""A guest of the fleet, as a job that Slurm knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.fleet.journal import Entry, What

ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
)
"""States of a job whose guest has ended."""
_AFTER_START = (What.STARTED, What.READY, What.READY_BY_SSH, What.ENDED)
"""Entries of which one is left if the oldest were dropped."""
_EXPLANATIONS = {
    "TIMEOUT": "the time of the guest (--minutes or --deadline) is over",
    "DEADLINE": "not started in time before its --deadline",
    "NODE_FAIL": "the host did not respond to the controller any more",
}
_NOT_STARTED = (
    "its host has not reported a start: the guest was cancelled before, or slurmd lost the controller just then; use another id"
)
"""slurmd ends a job if it cannot confirm with the controller that it starts the job (measured)."""


@dataclass(frozen=True)
class Job:
    """A guest of the fleet.

    Attributes:
        node: empty while it waits.
        reason: why it waits, or why it has ended.
        guest_id: the caller's own id of the guest, which outlives the job's number.
        note: why the guest was refused by its host, or has failed or was not started there.
        submitted: UTC, ISO 8601, as are ``started`` and ``ended``, which are empty before.
        entries: what its host reported.
        tenant: Slurm's account; empty for a guest of the operators.
        is_held: Slurm does not start it before it is released. The reason can be another one, such as a dependency.
    """

    number: int
    state: str
    node: str
    name: str
    reason: str
    guest_id: str
    note: str = ""
    submitted: str = ""
    started: str = ""
    ended: str = ""
    entries: tuple[Entry, ...] = ()
    tenant: str = ""
    is_held: bool = False

    @property
    def explanation(self) -> str:
        """The note or the reason, in words."""
        return self.note or _EXPLANATIONS.get(self.state, self.reason)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def is_ending(self) -> bool:
        """Also while the Epilog runs."""
        return self.has_ended or self.state == "COMPLETING"


def find_note(state: str, node: str, entries: Sequence[Entry]) -> str:
    """The last report of a refusal or failure. For a guest that was not started: that no start was reported. Otherwise empty."""
    for entry in reversed(entries):
        if entry.what in (What.REFUSED, What.FAILED):
            return entry.text
    has_started = any(entry.what in _AFTER_START for entry in entries)
    return _NOT_STARTED if state == "CANCELLED" and node and not has_started else ""
