"""What a manager that has just started does with each guest of the ledger. Pure: what is recorded and what runs → a decision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.errors import Conflict
from orchestrator.ledger import Claim
from orchestrator.model.state import GuestState
from orchestrator.values import CpuSet


class Action(StrEnum):
    """What is done with a guest."""

    ADOPT = "adopt"
    """It runs, and is kept as it is."""
    FINISH = "finish"
    """What was begun is brought to its end: a start of a guest that runs already, or the end of one that has ended."""
    UNDO = "undo"
    """What was done for a guest that never came to run is undone, and its claim is released."""
    QUARANTINE = "quarantine"
    """It stays, or goes, where nobody gets what it had."""
    NONE = "none"
    """It does not run and is not meant to."""


@dataclass(frozen=True)
class Decision:
    """What is done with a guest, the state that it gets first, and why."""

    action: Action
    state: GuestState
    why: str


def decide(state: GuestState, *, running: bool) -> Decision:
    """Decides from what the ledger says and from whether the guest runs. A guest that runs is never ended.

    Args:
        state: the guest's state in the ledger.
        running: whether it runs now, as libvirt tells.
    """
    return _IF_RUNNING[state] if running else _IF_NOT[state]


def check_housekeeping(claims: Iterable[Claim], housekeeping: CpuSet) -> None:
    """A host's housekeeping CPUs may be changed while there are guests, but not be taken from one.

    Raises:
        Conflict: some are a guest's; with each such guest, and what to do.
    """
    taken = [
        f"CPUs {both} are guest {claim.plan.name}'s" for claim in claims if (both := CpuSet.of(claim.plan.cpus) & housekeeping)
    ]
    if taken:
        raise Conflict(
            f"CPUs {housekeeping} cannot be for housekeeping: {'; '.join(taken)}",
            "put [host] housekeeping back as it was and delete the guest first; guests that run go on meanwhile",
        )


_CUT_SHORT = "its end was asked for, but not begun when the manager ended; ask again"

_IF_RUNNING = {
    GuestState.CREATING: Decision(Action.FINISH, GuestState.RUNNING, "it was started just before the manager ended"),
    GuestState.STARTING: Decision(Action.FINISH, GuestState.RUNNING, "it was started just before the manager ended"),
    GuestState.RUNNING: Decision(Action.ADOPT, GuestState.RUNNING, "it runs as it should"),
    GuestState.STOPPING: Decision(Action.ADOPT, GuestState.RUNNING, _CUT_SHORT),
    GuestState.DELETING: Decision(Action.ADOPT, GuestState.RUNNING, _CUT_SHORT),
    GuestState.STOPPED: Decision(
        Action.QUARANTINE, GuestState.QUARANTINED, "it runs although it is stopped: somebody else has started it"
    ),
    GuestState.QUARANTINED: Decision(Action.QUARANTINE, GuestState.QUARANTINED, "it runs although it is in quarantine"),
}

_IF_NOT = {
    GuestState.CREATING: Decision(Action.UNDO, GuestState.DELETING, "it never came to run"),
    GuestState.STARTING: Decision(Action.FINISH, GuestState.STOPPING, "its start was cut short when the manager ended"),
    GuestState.RUNNING: Decision(Action.FINISH, GuestState.STOPPING, "it ended while no manager ran"),
    GuestState.STOPPING: Decision(Action.FINISH, GuestState.STOPPING, "its end was cut short when the manager ended"),
    GuestState.DELETING: Decision(Action.FINISH, GuestState.DELETING, "its end was cut short when the manager ended"),
    GuestState.STOPPED: Decision(Action.NONE, GuestState.STOPPED, "it is stopped"),
    GuestState.QUARANTINED: Decision(Action.QUARANTINE, GuestState.QUARANTINED, "an operator has to clear it"),
}

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 300.0
MOST_RESTARTS = 10


def plan_pause(restarts: int) -> float | None:
    """Seconds before a guest that has failed is started again: twice as long each time, up to five minutes; None to give up.

    Args:
        restarts: how often it was started again already since somebody asked for it.
    """
    return None if restarts >= MOST_RESTARTS else min(_FIRST_PAUSE * 2**restarts, _LONGEST_PAUSE)
