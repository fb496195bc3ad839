"""Decides from ledger and libvirt what a started manager does with each guest. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.errors import Conflict
from orchestrator.ledger import Claim
from orchestrator.model.state import GuestState
from orchestrator.values import CpuSet


class RecoveryAction(StrEnum):
    """The values except ``none`` are event kinds."""

    ADOPT = "adopt"
    """The guest keeps running."""
    FINISH = "finish"
    """An interrupted start of a running guest, or an interrupted shutdown, is completed."""
    UNDO = "undo"
    """A creation that did not complete is undone, and its claim released."""
    QUARANTINE = "quarantine"
    """The guest's resources are withheld."""
    NONE = "none"
    """The guest does not run, as intended."""


@dataclass(frozen=True)
class Decision:
    action: RecoveryAction
    state: GuestState
    """Set before the action."""
    why: str


def decide(state: GuestState, *, running: bool) -> Decision:
    """``state`` is the ledger's, ``running`` libvirt's. No decision ends a running guest."""
    return _IF_RUNNING[state] if running else _IF_NOT[state]


def check_housekeeping(claims: Iterable[Claim], housekeeping: CpuSet) -> None:
    """Raises Conflict, with the names of the guests, if guests own housekeeping CPUs."""
    owned = [
        f"CPUs {both} are owned by guest {claim.plan.name}"
        for claim in claims
        if (both := CpuSet.of(claim.plan.cpus) & housekeeping)
    ]
    if owned:
        raise Conflict(
            f"CPUs {housekeeping} cannot be housekeeping: {'; '.join(owned)}",
            "restore [host] housekeeping and delete these guests first; running guests keep running",
        )


_NOT_STARTED = "its shutdown was requested, but not started when the manager exited; request it again"

_IF_RUNNING = {
    GuestState.CREATING: Decision(RecoveryAction.FINISH, GuestState.RUNNING, "it was launched just before the manager exited"),
    GuestState.STARTING: Decision(RecoveryAction.FINISH, GuestState.RUNNING, "it was launched just before the manager exited"),
    GuestState.RUNNING: Decision(RecoveryAction.ADOPT, GuestState.RUNNING, "running as intended"),
    GuestState.STOPPING: Decision(RecoveryAction.ADOPT, GuestState.RUNNING, _NOT_STARTED),
    GuestState.DELETING: Decision(RecoveryAction.ADOPT, GuestState.RUNNING, _NOT_STARTED),
    GuestState.STOPPED: Decision(
        RecoveryAction.QUARANTINE, GuestState.QUARANTINED, "running although stopped: started outside the manager"
    ),
    GuestState.WIPING: Decision(
        RecoveryAction.QUARANTINE, GuestState.QUARANTINED, "running although its disks are wiped: started outside the manager"
    ),
    GuestState.QUARANTINED: Decision(RecoveryAction.QUARANTINE, GuestState.QUARANTINED, "running although quarantined"),
}

_IF_NOT = {
    GuestState.CREATING: Decision(RecoveryAction.UNDO, GuestState.DELETING, "creation did not complete"),
    GuestState.STARTING: Decision(RecoveryAction.FINISH, GuestState.STOPPING, "start was interrupted when the manager exited"),
    GuestState.RUNNING: Decision(RecoveryAction.FINISH, GuestState.STOPPING, "ended while no manager ran"),
    GuestState.STOPPING: Decision(RecoveryAction.FINISH, GuestState.STOPPING, "shutdown was interrupted when the manager exited"),
    GuestState.DELETING: Decision(RecoveryAction.FINISH, GuestState.DELETING, "shutdown was interrupted when the manager exited"),
    GuestState.WIPING: Decision(RecoveryAction.FINISH, GuestState.WIPING, "wiping was interrupted when the manager exited"),
    GuestState.STOPPED: Decision(RecoveryAction.NONE, GuestState.STOPPED, "stopped"),
    GuestState.QUARANTINED: Decision(RecoveryAction.QUARANTINE, GuestState.QUARANTINED, "an operator must clear it"),
}
